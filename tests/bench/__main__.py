"""`make bench`: every benchmark, one after the other, in one table beside its rival and its budget (DESIGN.md).

`python -m tests.bench [fetch triton seg oru mllp end-to-end destinations workers]` runs those named, all where none is.
Exits 1 where a budget is broken.
"""

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.table import Table

from tests.bench import bench_fetch
from tests.bench.bench_destinations import bench_destinations
from tests.bench.bench_end_to_end import bench_end_to_end
from tests.bench.bench_mllp import bench_mllp
from tests.bench.bench_oru import bench_oru
from tests.bench.bench_seg import bench_seg
from tests.bench.bench_triton import bench_client
from tests.bench.bench_workers import bench_workers
from tests.bench.row import Row

FETCH_REPETITIONS, FETCH_MEBIBYTES = 21, 512


def fetch_rows() -> list[Row]:
    """WADO-RS study fetch beside curl, and its memory."""
    where = bench_fetch.spool_folder(FETCH_MEBIBYTES)
    rows = []
    for result in bench_fetch.run(FETCH_REPETITIONS, FETCH_MEBIBYTES, where):
        budget = f"<= {result.budget:g}{'x' if result.ratio is not None else f' {result.unit}'}"
        rows.append(
            Row(
                result.name,
                result.unit,
                result.ours,
                budget=budget,
                within=result.kept,
                rival=result.rival,
                rival_name="curl" if result.rival is not None else "",
                ratio=result.ratio,
            )
        )
    return rows


def triton_rows() -> list[Row]:
    """Our Triton client beside the stock one."""
    one = bench_client()
    return [
        Row(
            one["name"],
            one["unit"],
            one["ours"],
            budget=f"<= {one['budget']:g}x",
            within=one["within"],
            rival=one["rival"],
            rival_name=one["rival_name"],
            ratio=one["ratio"],
        )
    ]


BENCHES: Mapping[str, Callable[[], list[Row]]] = {
    "fetch": fetch_rows,
    "triton": triton_rows,
    "seg": lambda: [bench_seg()],
    "oru": lambda: [bench_oru()],
    "mllp": bench_mllp,
    "end-to-end": bench_end_to_end,
    "destinations": bench_destinations,
    "workers": bench_workers,
}


def show(rows: list[Row], console: Console) -> None:
    """Print the table."""
    table = Table("what", "ours", "rival", "ratio", "budget", "within", title="wetread bench", title_justify="left")
    for row in rows:
        rival = f"{row.rival:.4g} {row.unit} ({row.rival_name})" if row.rival is not None else "-"
        ratio = f"{row.ratio:.2f}" if row.ratio is not None else "-"
        within = {None: "", True: "[green]yes[/]", False: "[bold red]OVER[/]"}[row.within]
        table.add_row(row.what, f"{row.ours:.4g} {row.unit}", rival, ratio, row.budget or "-", within)
    console.print(table)


def main() -> int:
    """Run what is asked for; 1 where a budget is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*BENCHES, []], help="which; default: all")
    names = parser.parse_args().names or list(BENCHES)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(highdicom|pydicom)\.")
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    rows: list[Row] = []
    for name in names:
        console.print(f"[dim]running {name}[/]")
        rows += BENCHES[name]()
    show(rows, console)
    load = " ".join(f"{each:.1f}" for each in os.getloadavg())
    console.print(f"{os.cpu_count()} CPUs, load average {load}; temporary files in {tempfile.gettempdir()}")
    return 1 if any(row.within is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
