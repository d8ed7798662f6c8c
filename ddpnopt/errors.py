"""What this package raises. Divergence of a run is a result, not an error: see `ddpnopt.results`."""


class DDPNOptError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(DDPNOptError, ValueError):
    """A configuration value that is not allowed.

    Attributes:
        field: dotted name of the field.
        value: what was given.
        allowed: what is allowed, in words.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}: got {value!r}; allowed: {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, object, str]]:
        """Keep the fields when the error crosses a process boundary."""
        return type(self), (self.field, self.value, self.allowed)


class DataError(DDPNOptError):
    """A dataset that is missing, truncated or not what its name promises."""


class MissingDataError(DataError):
    """A dataset whose files are not there and could not be fetched."""
