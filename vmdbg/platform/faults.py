"""What a device or register file raises when the access must fault in the guest."""


class MsrFault(Exception):
    """RDMSR or WRMSR of `number` must raise #GP(0).  `value` is what was to be written, None for a read."""

    def __init__(self, number: int, value: int | None, rule: str) -> None:
        access = "RDMSR" if value is None else f"WRMSR of {value:#x}"
        super().__init__(f"{access}, MSR {number:#x}: {rule}")
        self.number = number
        self.value = value
        self.rule = rule
