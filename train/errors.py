"""The one exception that a person is meant to read."""


class UserError(Exception):
    """Something the user can mend: says what is wrong, where, and the remedy. Shown without a traceback; exit status
    2.
    """
