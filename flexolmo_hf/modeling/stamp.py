"""A stamp that no two holders share, copies and pickles of a holder included."""

import uuid


class Stamp:
    """Tells one model, or one state of it, from every other.

    What is copied together stays together: a copy of a model and the selections it holds get one new stamp, if one
    call of `copy.deepcopy` or `pickle` made them. A shallow copy of a model has the layers of the original, and its
    stamps.

    Attributes:
        id: The stamp as text, for marks that outlive the model.
    """

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex

    def __reduce__(self) -> tuple[type["Stamp"], tuple[()]]:
        """Let copies begin with a stamp of their own."""
        return type(self), ()
