"""The methods a request can name in `align`: one file per paper, its parameters as a frozen dataclass, its maths as functions."""
