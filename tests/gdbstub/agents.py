"""A little assembler of agent expressions, an environment to evaluate them in, and an interpreter to compare with."""

from collections.abc import Callable

from gdbstub.agent import OPS, AgentError, Program

OPCODES = {op.name: code for code, op in OPS.items()}

M = (1 << 64) - 1


def assemble(text: str) -> bytes:
    """Instructions divided by semicolons: a name and operands.  `name:` alone is a label; const is of the size that fits."""
    labels: dict[str, int] = {}
    for _ in range(2):  # once for the labels
        out = bytearray()
        for part in filter(None, (part.strip() for part in text.split(";"))):
            word, *operands = part.split(None, 2) if part.startswith("printf") else part.split()
            if word.endswith(":"):
                labels[word[:-1]] = len(out)
            elif word == "const":
                value = int(operands[0], 0) & M
                size = next(n for n in (1, 2, 4, 8) if value < 1 << 8 * n)
                out += bytes([OPCODES[f"const{8 * size}"]]) + value.to_bytes(size, "big")
            elif word == "printf":
                form = operands[1].encode() + b"\0"
                out += bytes([OPCODES[word], int(operands[0])]) + len(form).to_bytes(2, "big") + form
            else:
                code = OPCODES[word]
                out.append(code)
                if OPS[code].operand:
                    value = labels.get(operands[0], 0) if word.endswith("goto") else int(operands[0], 0)
                    out += value.to_bytes(OPS[code].operand, "big")
    return bytes(out)


class Bench:
    """Registers that hold their number times 0x0101010101010101, and a kilobyte of memory at 0x1000."""

    def __init__(self) -> None:
        self.bytes = bytes(n * 7 & 0xFF for n in range(1024))
        self.variables: dict[int, int] = {}
        self.told: list[tuple[object, ...]] = []

    def register(self, number: int) -> int:
        return number * 0x0101010101010101 & M

    def memory(self, address: int, length: int) -> bytes:
        return self.bytes[address - 0x1000 : address - 0x1000 + length] if address >= 0x1000 else b""

    def variable(self, number: int) -> int:
        return self.variables.get(number, 0)

    def set_variable(self, number: int, value: int) -> None:
        self.variables[number] = value

    def trace(self, address: int, length: int) -> None:
        self.told.append(("trace", address, length))

    def trace_string(self, address: int, length: int) -> None:
        self.told.append(("string", address, length))

    def trace_variable(self, number: int) -> None:
        self.told.append(("variable", number))

    def print(self, text: str) -> None:
        self.told.append(("print", text))


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def interpret(program: Program, bench: Bench) -> int:
    """The manual's words, one instruction after the other, on a stack that grows and shrinks."""
    stack: list[int] = []
    at = steps = 0
    while True:
        steps += 1
        if steps > 1 << 16:
            raise AgentError("loops")
        name, n = program.instructions[at].name, program.instructions[at].operand
        at += 1
        if name == "end":
            return stack[-1] if stack else 0
        if name.startswith("const"):
            stack.append(n)
        elif name == "reg":
            stack.append(bench.register(n))
        elif name == "getv":
            stack.append(bench.variable(n))
        elif name == "setv":
            bench.set_variable(n, stack[-1])
        elif name == "tracev":
            bench.trace_variable(n)
        elif name == "goto":
            at = n
        elif name == "if_goto":
            at = n if stack.pop() else at
        elif name == "dup":
            stack.append(stack[-1])
        elif name == "pop":
            stack.pop()
        elif name == "pick":
            stack.append(stack[-1 - n])
        elif name == "swap":
            stack[-1], stack[-2] = stack[-2], stack[-1]
        elif name == "rot":
            stack.insert(-2, stack.pop())
        elif name in ("trace_quick", "trace16"):
            bench.trace(stack[-1], n)
        elif name in ("trace", "tracenz"):
            length, address = stack.pop(), stack.pop()
            (bench.trace if name == "trace" else bench.trace_string)(address, length)
        elif name == "printf":
            count = program.formats[n].count
            stack.pop()
            stack.pop()
            arguments = [stack.pop() for _ in range(count)]
            bench.print(program.formats[n](arguments, bench.memory))
        elif name.startswith("ref"):
            address, size = stack.pop(), int(name[3:]) // 8
            data = bench.memory(address, size)
            if len(data) < size:
                raise AgentError("unreadable")
            stack.append(sum(byte << 8 * k for k, byte in enumerate(data)))
        elif name in ("ext", "zero_ext"):
            value = stack.pop()
            low = value % 2**n
            negative = name == "ext" and n > 0 and low >= 2 ** (n - 1)
            stack.append((low - 2**n if negative else low) & M if n < 64 else value)
        elif name in ("log_not", "bit_not"):
            value = stack.pop()
            stack.append(int(value == 0) if name == "log_not" else M - value)
        else:
            b, a = stack.pop(), stack.pop()
            stack.append(arithmetic(name, a, b) & M)


def arithmetic(name: str, a: int, b: int) -> int:
    if name.endswith("_signed") and name != "rsh_signed":
        a, b = signed(a), signed(b)
    if name.startswith(("div", "rem")):
        if b == 0:
            raise AgentError("division by zero")
        quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        return quotient if name.startswith("div") else a - b * quotient
    if name == "lsh":
        return a << b if b < 64 else 0
    if name.startswith("rsh"):
        return (signed(a) if name == "rsh_signed" else a) >> min(b, 64)
    if name.startswith("less"):
        return int(a < b)
    results = {
        "add": a + b, "sub": a - b, "mul": a * b, "bit_and": a & b, "bit_or": a | b, "bit_xor": a ^ b, "equal": int(a == b),
    }  # fmt: skip
    return results[name]


def outcome(evaluate: Callable[[Bench], int], bench: Bench) -> object:
    """A result with all that was told and set meanwhile, or that there was none: a loop may be given up a little later."""
    try:
        return evaluate(bench), bench.told, bench.variables
    except AgentError:
        return AgentError
