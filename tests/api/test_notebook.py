# SPDX-License-Identifier: GPL-2.0-or-later
"""The API in a real Jupyter kernel, which runs an event loop: the example notebook, and a run that somebody interrupts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.api.conftest import ENDLESS, IMAGE
from tests.engine.assembler import assemble
from tests.patience import PATIENCE

nbformat = pytest.importorskip("nbformat", reason="nbclient and ipykernel, which run notebooks, are not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient, which runs notebooks, is not installed")
manager = pytest.importorskip("jupyter_client.manager", reason="ipykernel, a kernel for notebooks, is not installed")

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples/notebook/first.ipynb"


def test_the_example_notebook() -> None:
    if not IMAGE.exists():
        pytest.skip("the demo hypervisor is not built: no gcc and ld for x86-64")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=int(PATIENCE), startup_timeout=int(PATIENCE), resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    shown = [cell.outputs[-1].data for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]
    stop, guests, exits, walk, numbers, again, back = shown
    assert "&lt;work&gt;" in stop["text/html"]
    assert "<td>guest 2</td>" in guests["text/html"]
    assert exits["text/html"].count("<tr>") == 6
    assert walk["text/html"].startswith("<pre>0x")
    assert "rights: read" in walk["text/plain"]
    assert numbers["text/plain"].startswith("(<ExitCode.")
    assert "breakpoint" in again["text/html"]
    assert back["text/plain"] == numbers["text/plain"].split(", ")[1]


def test_interrupting_the_kernel_stops_the_run_and_nothing_else(tmp_path: Path) -> None:
    image = tmp_path / "endless.bin"
    image.write_bytes(assemble(ENDLESS, 0x8000).code)
    kernel, client = manager.start_new_kernel(startup_timeout=PATIENCE, kernel_name="python3")
    try:
        made = f"import vmdbg\nm = vmdbg.Machine({str(image)!r}, flat=0x8000, mode='long', memory='16M')"
        assert client.execute_interactive(made, timeout=PATIENCE)["content"]["status"] == "ok"
        # By default a kernel refuses for a while what comes behind an error.
        client.execute("print('runs'); m.run()", stop_on_error=False)
        while True:  # until the cell is at work
            message = client.get_iopub_msg(timeout=PATIENCE)
            if message["msg_type"] == "stream" and "runs" in message["content"]["text"]:
                break
        kernel.interrupt_kernel()
        reply = client.get_shell_msg(timeout=PATIENCE)
        assert (reply["content"]["status"], reply["content"]["ename"]) == ("error", "KeyboardInterrupt")
        said: list[str] = []

        def keep(message: dict[str, dict[str, dict[str, str]]]) -> None:
            said.append(message["content"].get("data", {}).get("text/plain", ""))

        reply = client.execute_interactive("m.run(ticks=1000).reason", timeout=PATIENCE, output_hook=keep)
        assert reply["content"]["status"] == "ok"
        assert "<Reason.LIMIT: 'limit'>" in said
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
