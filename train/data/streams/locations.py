"""Where many rows are ("file:line"), in 12 bytes each: the number at the end apart from what is before it."""

import re
from array import array

NUMBER = re.compile(r"(?:0|[1-9][0-9]{0,17})\Z")  # at the end of a location: a line, a row


class Locations:
    """Locations by row. One is `places[place[row]] + str(number[row])`, or the place alone where the number is -1."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}  # place -> its number
        self.places: list[str] = []
        self.place, self.number = array("i"), array("q")  # int32, int64

    def __len__(self) -> int:
        return len(self.place)

    def add(self, location: str) -> None:
        """That of the next row."""
        digits, number = len(location) - len(location.rstrip("0123456789")), -1
        if digits and NUMBER.match(location[-digits:]):
            number, location = int(location[-digits:]), location[:-digits]
        place = self._numbers.setdefault(location, len(self.places))
        if place == len(self.places):
            self.places.append(location)
        self.place.append(place)
        self.number.append(number)

    def __getitem__(self, row: int) -> str:
        place, number = self.places[self.place[row]], self.number[row]
        return place if number < 0 else f"{place}{number}"
