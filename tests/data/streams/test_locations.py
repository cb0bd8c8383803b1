"""A location comes back as it was written."""

from train.data.streams.locations import Locations


def test_every_location_comes_back() -> None:
    texts = ["a.jsonl:1", "a.jsonl:20", "b.xlsx: row 5", "f:007", "f:0", "", "7", "f:12345678901234567890", "a.jsonl:1"]
    locations = Locations()
    for text in texts:
        locations.add(text)
    assert len(locations) == len(texts) and [locations[row] for row in range(len(texts))] == texts
    assert locations.places == ["a.jsonl:", "b.xlsx: row ", "f:007", "f:", "", "f:12345678901234567890"]
