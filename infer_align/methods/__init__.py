"""The methods that a request can name in `align`.

Each file is one method: its parameters as a frozen dataclass, and its maths as plain functions.
"""
