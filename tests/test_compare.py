"""The study of all methods: what it runs, that it goes on, what its tables say."""

import collections
import importlib
import json
import pathlib
import sys

import pytest
from absl import flags
from training import parsed

import base_config
import fashion_mnist_st3
from job.settings import settle

BENCHMARKS = pathlib.Path(base_config.__file__).parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # the folder is no package
study = importlib.import_module("compare_methods")
tables = importlib.import_module("compare_tables")

TRAIN = """
import json, pathlib, sys
flags = dict(arg[2:].split("=", 1) for arg in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
workdir.mkdir()
(workdir / "flags.json").write_text(json.dumps(flags))
if flags["config.seed"] == "13":
    sys.exit("no luck")
rate = float(flags["config.learning_rate.peak"])
report = {
    "test_accuracy": 0.9 - abs(rate - 0.2), "weights": 100, "nonzero_weights": 5,
    "multiply_adds": 700, "dense_multiply_adds": 9000, "steps": 2808,
    "config": {"batch_size": 128, "learning_rate": {"peak": rate}},
}
(workdir / "report.json").write_text(json.dumps(report))
"""


@pytest.fixture(autouse=True)
def flags_are_parsed():
    flags.FLAGS.mark_as_parsed()


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """A study whose training program only writes a report."""
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(study, "EXPERIMENTS", tmp_path)
    return study.Study(tmp_path / "results" / "rows.csv", tmp_path / "runs")


def count(rows):
    return collections.Counter((row.row, row.sparsity) for row in rows)


def test_every_method_runs_at_every_sparsity_for_every_seed():
    runs = study.study(rate=0.2)
    counts = count(runs)
    assert counts["dense", 0.0] == 3
    for method in study.METHODS:
        for sparsity in (0.8, 0.9, 0.95, 0.98):
            assert counts[method, sparsity] == 3
    assert len({run.name for run in runs}) == len(runs)
    assert {run.fields["learning_rate.peak"] for run in runs} == {0.2}


def test_every_run_has_settings_that_are_of_use():
    settled = {
        json.dumps(fields, sort_keys=True): settle(
            parsed(
                f"--config={fashion_mnist_st3.__file__}",
                *(f"--config.{name}={value}" for name, value in fields.items()),
            )
        )
        for fields in (run.fields for run in [*study.sweep(), *study.study(rate=0.2)])
    }
    assert len(settled) > 40
    dense = next(x.config for x in settled.values() if x.config.sparsity.final is None)
    assert dense.sparsity.method == "none"


def test_the_ablation_has_every_combination_once():
    runs = list(study.ablation())
    assert len(runs) == 2 * (2 * 2 * 2 * 3 - 1)
    ingredients = {
        tuple(run.fields[f"sparsity.{name}"] for name in (
            "soft", "rescale", "straight_through", "power",
        ))
        for run in runs
    }  # fmt: skip
    assert len(ingredients) == 23
    assert (True, True, True, 3.0) not in ingredients
    assert study.ablation_row(True, True, True, 3.0) == "ST-3"


def test_rows_are_written_once_and_missing_ones_are_run_again(runner, capsys):
    runs = list(study.sweep())
    runner.finish(runs[:2])
    first = study.read_rows(runner.path)
    runner.finish(runs)
    rows = study.read_rows(runner.path)
    assert rows[:2] == first
    assert len(rows) == len(runs) == 4
    assert study.best_rate(runner.path) == 0.2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith("[4/4] learning_rate_")
    assert "95 zeros" in lines[-1]
    runner.finish(runs)
    assert not capsys.readouterr().out


def test_a_run_gets_its_fields_on_the_command_line(runner):
    run = next(run for run in study.study(rate=0.2) if run.row == "LRR")
    row = runner.train(run)
    text = (runner.folder / run.name / "flags.json").read_text()
    assert '"config.sparsity.method": "lrr"' in text
    assert f'"config.sparsity.final": "{run.sparsity}"' in text
    assert (row["zeros"], row["epochs"], row["accuracy"]) == (95, 6, 0.9)


def test_epochs_keep_a_decimal(runner):
    script = study.EXPERIMENTS / "train.py"
    script.write_text(TRAIN.replace('"steps": 2808', '"steps": 1122'))  # --quick's
    run = study.study(rate=0.2)[0]
    assert runner.train(run)["epochs"] == 2.4


def test_a_run_that_fails_is_named_and_the_others_go_on(runner, capsys):
    rate = {"learning_rate.peak": 0.1}
    runs = [study.Run("dense", 0.0, seed, rate) for seed in (13, 1)]
    with pytest.raises(SystemExit, match="dense-0-seed13"):
        runner.finish(runs)
    assert [row["seed"] for row in study.read_rows(runner.path)] == ["1"]
    out = capsys.readouterr().out
    assert "failed: dense-0-seed13" in out
    assert "no luck" in (runner.folder / "dense-0-seed13.log").read_text()


def rows(*triples, **fields):
    base = {
        "zeros": "95", "weights": "100", "multiply_adds": "2000",
        "dense_multiply_adds": "9000", "epochs": "6", "learning_rate": "0.1",
    }  # fmt: skip
    return [
        {**base, "row": row, "asked_sparsity": str(s), "seed": str(i), "accuracy": a}
        | fields
        for row, s, accuracies in triples
        for i, a in enumerate(accuracies)
    ]


def test_tables_have_means_spreads_and_say_what_is_missing():
    cells = tables.by_cell(
        [
            *rows(("dense", 0.0, ("0.9", "0.91", "0.92"))),
            *rows(("ST-3", 0.95, ("0.8", "0.8", "0.83"))),
            *rows(("GMP", 0.9, ("0.5",))),
            *rows(("LRR", 0.8, ("0.7",) * 3), epochs="24"),
            *rows(("LRR", 0.9, ("0.6",) * 3), epochs="30"),
        ]
    )
    text = tables.accuracies(cells, {"ST-3": 1.5, "GMP": 1.0, "LRR": 1.1}, seeds=3)
    assert "|  | 0 % | 80 % | 90 % | 95 % | epochs | time |" in text
    assert "| dense | 91.00 ± 1.00 |  |  |  | 6 | 1.0 |" in text
    assert "| ST-3 |  |  |  | 81.00 ± 1.73 | 6 | 1.5 |" in text
    assert "| GMP |  |  | 50.00 (1 of 3 runs) |  | 6 | 1.0 |" in text
    assert "| LRR |  | 70.00 ± 0.00 | 60.00 ± 0.00 |  | 24 / 30 | 4.4 / 5.5 |" in text
    assert "| ST-3 |  |  | 95; 2 |" in tables.costs(cells)
    assert "81.00 ± 1.73" in tables.ablation(cells, seeds=3)


def test_zeros_that_differ_between_seeds_are_shown():
    runs = rows(("ProbMask", 0.9, ("0.5", "0.6")))
    runs[1]["zeros"] = "97"
    (cell,) = tables.by_cell(runs).values()
    assert tables.cost(cell) == "95 to 97; 2"


def test_figures_tell_of_longer_training():
    cells = [rows(("LRR", 0.8, ("0.7",)), epochs=e) for e in ("24", "36")]
    cells = [cell for some in cells for cell in tables.by_cell(some).values()]
    assert tables.longer(cells, 6.0) == ", 24 to 36 epochs"
    assert tables.longer(cells[:1], 6.0) == ", 24 epochs"
    assert tables.longer(cells[:1], 24.0) == ""


def test_figures_show_every_method(tmp_path):
    methods = [(name, s, ("0.8", "0.9")) for name in study.METHODS for s in (0.8, 0.9)]
    cells = tables.by_cell(rows(("dense", 0.0, ("0.9",)), *methods))
    for kind in ("weights", "multiply_adds"):
        tables.plot(cells, tmp_path / f"{kind}.png", kind)
        assert (tmp_path / f"{kind}.png").stat().st_size > 10_000
    assert set(tables.STYLES) == set(study.METHODS)


def test_the_pages_show_what_the_rows_say():
    root = BENCHMARKS.parent.parent
    readme = (root / "README.md").read_text()
    page = (root / "docs" / "study.md").read_text()
    cells = tables.by_cell(study.read_rows(study.RESULTS / "compare_methods.csv"))
    ratios = tables.read_ratios(study.RESULTS / "compare_steps.csv")
    assert tables.accuracies(cells, ratios, len(study.SEEDS)) in readme
    assert tables.accuracies(cells, ratios, len(study.SEEDS)) in page
    assert tables.costs(cells) in page
    assert tables.ablation(cells, len(study.ABLATION_SEEDS)) in page


def test_every_row_of_the_results_belongs_to_the_study():
    rows = study.read_rows(study.RESULTS / "compare_methods.csv")
    asked = {run[:3] for run in [*study.sweep(), *study.study(rate=0.2)]}
    assert {study.key(row) for row in rows} <= asked
    assert len({study.key(row) for row in rows}) == len(rows)
    for row in rows:
        sparsity, weights = float(row["asked_sparsity"]), int(row["weights"])
        few = 100 if row["row"] == "GraNet" else 2  # what was just grown is zero, too
        least = int(sparsity * (weights - 1)) + 1 if sparsity else 0
        assert least <= int(row["zeros"]) <= least + few
