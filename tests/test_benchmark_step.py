"""The benchmark of a step at toy size: every row is there and well formed, and what it compares is what it says."""

from __future__ import annotations

import json
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import benchmark_step
from step_benchmark import imports, polar
from step_benchmark.baselines import erm_pass, muon_newton_schulz, naive_sage_pass
from step_benchmark.memory import peak_of
from step_benchmark.table import Row, to_markdown
from step_benchmark.timing import interleaved
from step_benchmark.workload import Setting, Workload

from hf_sage.engine import two_pass_step
from hf_sage.methods import sage

CPU = torch.device("cpu")
TOY = Setting(CPU, repetitions=1, quick=True)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("benchmark") / "results.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imports, "PAIRS", (("import json", "import sys", 1.1), ("import csv", "import sys", None)))
        arguments = ["--quick", "--repetitions", "1", "--output", str(output)]
        assert benchmark_step.main(arguments) == 0
    loaded: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    assert output.with_suffix(".md").read_text(encoding="utf-8").count("\n") == len(loaded["rows"]) + 2
    return loaded


def test_every_row_is_measured_or_says_why_not(result: dict[str, Any]) -> None:
    rows = result["rows"]
    assert list(dict.fromkeys(row["section"] for row in rows)) == list(benchmark_step.SECTIONS)
    assert len({(row["what"], row["config"]) for row in rows}) == len(rows)
    for row in rows:
        if row["measured"] is None:
            assert "not installed" in row["note"]
            continue
        has_target = row["at_most"] is not None or row["at_least"] is not None
        assert (row["reached"] is not None) == has_target
        if row["low"] is not None:  # one repetition: the median is both ends
            assert row["low"] == row["high"] == pytest.approx(row["measured"])


def test_every_target_is_there(result: dict[str, Any]) -> None:
    targets = [(row["section"], row["at_most"], row["at_least"]) for row in result["rows"]]
    for expected in (
        *(("clean_pass", 1.08, None), ("clean_pass", 1.12, None), ("memory", 1.0, None)),
        *(("restore", 1.0, None), ("restore", 0, None)),
        *(("polar", 0.4, None), ("polar", None, 0.999), ("polar", 1e-3, None)),
        *(("step", 1.08, None), ("step", 0.65, None), ("step", 1.35, None), ("imports", 1.1, None)),
    ):
        assert expected in targets


def test_figures_stand_beside_what_they_depend_on(result: dict[str, Any]) -> None:
    assert result["versions"]["torch"] == version("torch")
    assert result["cpu"]
    assert result["gpu"] is None
    assert (result["dtype"], result["compile"], result["threads"]) == ("fp32", False, 1)
    assert result["timed_by"] == "process CPU time, one thread"


def test_every_preset_is_compared(result: dict[str, Any]) -> None:
    text = json.dumps([row["what"] for row in result["rows"]])
    assert all(preset in text for preset in polar.PRESETS)


def test_restoring_changes_no_bit(result: dict[str, Any]) -> None:
    (bits,) = [row for row in result["rows"] if "bits" in row["what"]]
    assert bits["measured"] == 0
    assert bits["reached"]
    assert not bits["note"].startswith("of 0 ")


def test_the_loop_is_that_of_torch() -> None:
    theirs = pytest.importorskip("torch.optim._muon")._zeropower_via_newtonschulz
    torch.manual_seed(0)
    for shape in ((24, 40), (40, 24), (32, 32)):
        g = torch.randn(shape)
        expected = theirs(g, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
        found = muon_newton_schulz(g, dtype=torch.bfloat16).float()
        # The same products in bf16, in another order at most: 2⁻⁸ each, through five steps.
        assert (found - expected).norm() < 0.02 * expected.norm()


def test_naive_sage_takes_the_gradient_that_the_library_takes() -> None:
    """At γ = 0 and with the same Newton–Schulz, line by line or not, Algorithm 1 is Algorithm 1."""
    gradients = []
    for run in (
        partial(naive_sage_pass, rho=1e-2, gamma=0.0),
        lambda work: two_pass_step(work.network, work.parts(), sage(1e-2, 0.0, polar="muon"), joint=work.joint()),
        erm_pass,
    ):
        work = Workload(TOY, "toy", groups=3, rows=2)
        before = [p.detach().clone() for p in work.parameters]
        run(work)
        assert all(torch.equal(p, q) for p, q in zip(work.parameters, before, strict=True))
        gradients.append(torch.cat([p.grad.flatten() for p in work.parameters]))
    naive, ours, erm = gradients
    # fp32 round-off through two passes and Newton–Schulz; what ε does to the gradient is far above it.
    assert (naive - ours).norm() < 1e-3 * naive.norm()
    assert (naive - erm).norm() > 1e-2 * naive.norm()


def test_peaks_are_those_of_tensors_alive() -> None:
    def work() -> None:
        kept = torch.zeros(1000)
        torch.zeros(2000)  # gone at once
        view = kept[10:]
        del kept
        torch.zeros(500)
        assert len(view) == 990  # alive until here, with all of its storage

    assert peak_of(work, CPU).total == 4 * 3000
    x = torch.randn(100, 50, requires_grad=True)

    def forward() -> torch.Tensor:
        return x.exp().exp().sum()  # each exp saves its result: nothing else is alive

    peak = peak_of(forward, CPU)
    assert peak.total == 4 * (2 * 5000 + 1)
    assert peak.outside_graph == 4 * 5000  # the newest, before it is saved


def test_contestants_take_turns() -> None:
    class Order:
        def __init__(self) -> None:
            self.ran: list[str] = []

        def laps(self, phases: Any) -> list[float]:
            self.ran.append(phases[0]())
            return [float(len(self.ran)), 1.0]

    clock = Order()
    names = ["a", "b", "c", "d"]
    times = interleaved({name: [lambda name=name: name] for name in names}, clock, repetitions=3, seed=0)
    rounds = [tuple(clock.ran[i : i + 4]) for i in range(0, 16, 4)]
    assert all(sorted(r) == names for r in rounds)
    assert len(set(rounds)) > 1  # shuffled anew
    assert all(len(times.total(name)) == 3 for name in names)  # the warm-up round does not count
    assert min(laps[0][0] for laps in times.seconds.values()) == 5.0
    assert times.ratio("a", "a").value == 1.0
    assert times.ratio("a", "b", phase=1).value == 1.0


def test_a_target_decides_whether_it_was_reached() -> None:
    below, above = Row("s", "w", "c", 1.05, at_most=1.08), Row("s", "w", "c", 0.9, at_least=0.99)
    assert (below.reached, above.reached, Row("s", "w", "c", 1.0).reached) == (True, False, None)
    assert Row("s", "w", "c", float("nan"), at_most=1.0).reached is False
    table = to_markdown([below, above])
    assert "| ≤ 1.08 | 1.050 | yes |" in table
    assert "| ≥ 0.99 | 0.900 | no |" in table


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (["--dtype", "tf32"], "--device cuda"),
        (["--repetitions", "0"], "1 or more"),
        (["--rows", "warp"], "choose from"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    arguments: list[str], cure: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    try:
        code = benchmark_step.main([*arguments, "--output", str(tmp_path / "results.json")])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code != 0
    assert cure in capsys.readouterr().err
