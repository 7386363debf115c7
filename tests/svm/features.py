"""docs/svm.md: what there is of SVM, from the tables of `introspect`, the claims of CPUID, and the tests with `covers`.

python -m tests.svm.features > docs/svm.md
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path

from introspect.exits import INTERCEPT_CODES, ExitCode, exit_section
from introspect.rules import EXCEPTIONS, FEATURE_SECTIONS, RULES, SVM_FEATURES
from vmdbg.svm import world

Key = int | str


def _codes(names: str) -> list[int]:
    return [int(ExitCode[name]) for name in names.split()]


_NO_REGISTER = [*(base + n for base in (0x00, 0x10) for n in (1, 5, 6, 7, *range(9, 16))),
                *(base + n for base in (0x20, 0x30) for n in range(8, 16))]  # fmt: skip
_RESERVED = [int(code) for code in ExitCode if 0x40 <= code < 0x60 and code.name[5:].isdigit()]

MISSING: dict[Key, str] = {
    **dict.fromkeys(_NO_REGISTER, "no such register: #UD comes first"),
    **dict.fromkeys(_RESERVED, "reserved: nothing raises it"),
    0x49: "a coprocessor's of long ago: the processor has #GP for it",
    **dict.fromkeys(_codes("EXCP_NMI"), "not implemented, by APM2 15.12.3; see NMI"),
    **dict.fromkeys(range(0x8F, 0xA0), "for SEV-ES guests only"),
    **dict.fromkeys(_codes("EXCP_MC"), "nothing fails here"),
    **dict.fromkeys(_codes("EXCP_CP"), "shadow stacks are not claimed"),
    **dict.fromkeys(_codes("EXCP_HV EXCP_VC"), "SEV is not claimed"),
    **dict.fromkeys(_codes("BUSLOCK IDLE_HLT"), "the feature is not claimed"),
    **dict.fromkeys(_codes("VMGEXIT BUSY IDLE_REQUIRED INVALID_PMC"), "no SEV"),
    "sss-np": "SSSCheck is not claimed",
    "efer-long": "this processor has long mode", "cet-wp": "CR4.CET is reserved here: cr4-mbz comes first",
    **dict.fromkeys(("tlb-control", "avic-np", "gmet-np", "write-traps"), "reported by `monitor vmrun why` only"),
}  # fmt: skip
"""What no guest program can show, and why."""


def tests() -> dict[Key, list[str]]:
    """What each test covers: key to "file: test", in the order of the files.  ValueError for a key that does not exist."""
    known: set[Key] = {*map(int, ExitCode), *(rule.id for rule in RULES), *SVM_FEATURES.fields}
    found: dict[Key, list[str]] = defaultdict(list)
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = import_module(f"tests.svm.{path.stem}")
        for name, test in vars(module).items():
            for key in getattr(test, "covers", ()) if name.startswith("test_") else ():
                if key not in known:
                    raise ValueError(f"{path.name}: {name} covers {key!r}, which is no exit code, rule or feature")
                found[key].append(f"{path.stem[5:]}: {name[5:]}")
    return found


def untested() -> list[Key]:
    """Intercepts, rules and claimed features without a test or a reason."""
    covered = tests()
    wanted: list[Key] = [*map(int, ExitCode), *(rule.id for rule in RULES)]
    wanted += [name for name, bit in SVM_FEATURES.fields.items() if bit & world.FEATURES]
    return [key for key in wanted if key not in covered and key not in MISSING]


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    heads = list(heads)
    yield "| " + " | ".join(heads) + " |"
    yield "| " + " | ".join("---" for _ in heads) + " |"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""


def _shown(key: Key, covered: dict[Key, list[str]]) -> str:
    return "; ".join(covered.get(key, ())) or f"- ({MISSING.get(key, 'not claimed')})"


def _injection(vector: int) -> str:
    """Whether EVENTINJ may have the vector as that of an exception."""
    return "yes" if vector in EXCEPTIONS else "as an NMI" if vector == 2 else "VMRUN refuses it"


def page() -> str:
    covered = tests()
    lines = [
        "# SVM, feature by feature", "",
        "Made by `python -m tests.svm.features` from the tables that the emulator runs on and from the tests: each test is a",
        "guest program, named as *file: test* of `tests/svm`, without their `test_`. Sections are those of APM2. A dash is what",
        "is not here, and why.", "",
        "## Features (CPUID Fn8000_000A EDX)", "",
        *_table(("bit", "feature", "section", "claimed", "tests"), (
            (str(bit.bit_length() - 1), name, FEATURE_SECTIONS.get(name, "-"), "yes" if bit & world.FEATURES else "no",
             _shown(name, covered)) for name, bit in SVM_FEATURES.fields.items()
        )),
        "## Consistency rules of VMRUN", "",
        *_table(("rule", "refused if", "section", "tests"), (
            (rule.id, rule.text, rule.section, _shown(rule.id, covered)) for rule in RULES
        )),
        "## Exceptions", "",
        "What raises each of the 32 is an instruction or event of the guest, in the tests named; where there are none it is only",
        "injected, if that. INT n comes to a handler of any vector, and is no exception to an intercept.", "",
        *_table(("vector", "exception", "raised", "injected as an exception"), (
            (str(code - 0x40), code.description, _shown(int(code), covered), _injection(code - 0x40))
            for code in sorted(ExitCode) if 0x40 <= code < 0x60
        )),
        "## Exit codes and intercepts", "",
        f"Codes below {INTERCEPT_CODES:X}h are intercepts: the intercept word at offset 4 * (code / 32) of the VMCB, bit code % 32.",
        "",
        *_table(("code", "name", "what", "section", "tests"), (
            (f"{code:X}", code.name, code.description, exit_section(code), _shown(int(code), covered)) for code in sorted(ExitCode)
        )),
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(page())
