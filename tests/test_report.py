"""The page of a run: one file, right in its numbers, whatever is in the folder."""

import copy
import html.parser
import json
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import onnx
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

import report as command
import st3jax
from errors import UserError
from page.drawing import outline
from page.latency import measure_latency
from page.runs import exported
from page.write import write_page
from workdir import histograms
from workdir.channels import dead_channels

pytestmark = pytest.mark.usefixtures("quickly_compiled")

LAYER = {
    "shape": [3, 3, 4, 8],
    "layout": "wwio",
    "weights": 288,
    "zeros": 200,
    "multiply_adds_per_weight": 16,
    "outputs": 8,
    "dead_outputs": 3,
    "inputs": 4,
    "unread_inputs": 1,
}
STACKED = {
    "shape": [2, 5, 6],
    "layout": "sio",
    "weights": 60,
    "zeros": 36,
    "zeros_of_each": [30, 6],
    "multiply_adds_per_weight": 1,
    "outputs": 12,
    "dead_outputs": 6,
    "inputs": 10,
    "unread_inputs": 5,
}
SPARSITY = {
    "method": "st3",
    "final": 0.7,
    "begin_epoch": 1,
    "end_epoch": 5,
    "power": 3.0,
    "layers": [],
    "dense": [],
    "budget": "weights",
    "criterion": None,
}
REPORT = {
    "test_accuracy": 0.8125,
    "sparsity": 236 / 348,
    "weights": 348,
    "nonzero_weights": 112,
    "multiply_adds": 1432,
    "dense_multiply_adds": 4668,
    "steps": 80,
    "steps_per_epoch": 10,
    "fine_tuning_begins": 60,
    "train_images": 640,
    "test_images": 160,
    "seed": 0,
    "skipped_images": 0,
    "skipped_test_images": 0,
    "layers": {"conv/kernel": LAYER, "mlp/kernel": STACKED},
    "config": {
        "model": {"name": "net", "dtype": None},
        "data": {"name": "digits"},
        "batch_size": 64,
        "sparsity": SPARSITY,
    },
    "versions": {"Python": "3.13.0", "jax": "0.12.0"},
    "machine": {"devices": "1 x cpu"},
}
HISTOGRAM = {
    "limit": 2.0,
    "raw": [1, 4, 16, 4, 0],
    "effective": [0, 4, 1, 4, 0],
    "zeros": 200,
    "weights": 288,
    "thresholds": [1.0],
}
ROWS = [
    {"step": 10 * i, "test_accuracy": i / 10, "sparsity": i / 12, "train_loss": 1 / i}
    for i in range(1, 9)
] + [{"step": 50, "dense_test_accuracy": 0.4375, "test_accuracy": 0.5}]


def fill(workdir, report=REPORT, **more):
    """A finished run in a folder, as ``train.py`` leaves it."""
    workdir.mkdir()
    (workdir / "report.json").write_text(json.dumps(report))
    (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    found = {"step": 59, "kernels": {"conv/kernel": HISTOGRAM}}
    (workdir / "histograms.json").write_text(json.dumps(found | more))
    return workdir


def changed(**fields):
    """The report with other values; dotted names reach inner fields."""
    report = copy.deepcopy(REPORT)
    for name, value in fields.items():
        *outer, last = name.split("__")
        node = report
        for key in outer:
            node = node[key]
        node[last] = value
    return report


@pytest.fixture
def run(tmp_path):
    return fill(tmp_path / "run")


def page_of(*workdirs):
    out = workdirs[0] / "report.html"
    write_page(out, workdirs)
    return out.read_text()


class Outline(html.parser.HTMLParser):
    """Elements that are closed in order, the identifiers, and the words."""

    EMPTY = ("meta", "br", "wbr", "img", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.text = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


def words(text):
    """What a person reads, with plain spaces, dashes and signs."""
    plain = {ord("\N{EN DASH}"): "-", ord("\N{MULTIPLICATION SIGN}"): "x"}
    return " ".join(
        " ".join(Outline(text.replace("<wbr>", "")).text).split()
    ).translate(plain)


def check_alone(text):
    """Well-formed, and nothing in it is fetched or run."""
    found = Outline(text)
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert not {"script", "link", "img", "iframe", "object", "base"} & {*found.tags}
    assert not re.search(r"https?:|//|@import|\bsrc=|\bon\w+=", text)
    references = re.findall(r'href="([^"]*)"|url\(([^)]*)\)', text)
    assert {a or b for a, b in references} <= {f"#{name}" for name in found.ids}


def test_the_page_stands_alone(run):
    check_alone(page_of(run))


def test_its_numbers_are_those_of_the_report(run):
    text = words(page_of(run))
    assert "81.25 % test accuracy with 67.82 % of 348 kernel weights exactly " in text
    assert "112 of 348 kernel weights left" in text
    assert "30.68 % 1,432 of 4,668 an image" in text
    assert "net on digits, 640 images, trained with st3: 80 steps of 64 images" in text
    assert "conv 69.44 % 1,408 4,608 3 / 8 1 / 4 288 3x3x4x8" in text
    assert "all 67.82 % 1,432 4,668 9 / 20 6 / 14 348" in text
    assert "of 160 images; their number alone makes it uncertain by 3.09 points" in text
    assert "After step 50: 50.00 %, and 43.75 % with the raw, dense weights" in text
    assert "After step 59, the last before the mask is fixed" in text
    assert "69.44 % zero, t = 1 " in text
    assert "sparsity.method st3" in text
    assert "Python 3.13.0" in text
    assert "sparsity.criterion" not in text  # of no use


def test_stacked_kernels_have_a_row_each(run):
    text = words(page_of(run))
    assert "mlp 60.00 % 24 60 6 / 12 5 / 10 60 2x5x6 [0] 100.00 % 0 30" in text
    assert "[1] 20.00 % 24 30" in text


def test_thresholds_are_drawn_where_they_are(run):
    text = page_of(run)
    assert re.findall(r'<line x1="([\d.]+)"', text) == ["1.25", "3.75"]
    assert outline([0, 4, 1], 4) == "M0 40V40.0h1V0.0h1V20.0h1V40Z"
    assert 'd="M0 40V30.0h1V20.0h1V0.0h1V20.0h1V40.0h1V40Z"' in text


def test_the_same_run_has_the_same_page(run):
    assert page_of(run) == page_of(run)


def test_files_are_listed_with_their_share_of_the_dense_one(run):
    for name, size in (("st3", 250), ("safetensors", 2000), ("st3.draft", 9)):
        (run / f"model.{name}").write_bytes(bytes(size))
    (run / "export").mkdir()
    (run / "export" / "model.onnx").write_bytes(bytes(1200))
    text = words(page_of(run))
    assert "250 bytes model.st3, 0.125 of the dense 2 kB" in text
    assert "export/model.onnx 1,200 0.600" in text
    assert "draft" not in text


def latencies(**milliseconds):
    """Those of files under ``export/``, as they are written down."""
    files = [
        {"file": f"export/{name}.onnx", "milliseconds": x, "fastest": x, "calls": 50}
        for name, x in milliseconds.items()
    ]
    return {"engine": "ONNX Runtime 1", "machine": "one", "files": files}


@pytest.mark.parametrize(
    ("compact", "told"), [(1.9, "model_compact"), (1.91, "model"), (2.0, "model")]
)
def test_a_compact_file_is_named_if_it_is_faster(run, compact, told):
    found = latencies(model_compact=compact, model=2.0)
    (run / "latency.json").write_text(json.dumps(found))
    assert f"ms an image, export/{told}.onnx in ONNX Runtime 1" in words(page_of(run))


def test_without_the_usual_file_the_fastest_is_named(run):
    (run / "latency.json").write_text(json.dumps(latencies(b=3.0, a=2.5)))
    assert "2.5 ms an image, export/a.onnx in" in words(page_of(run))


def test_a_dense_run_and_a_moving_average(tmp_path):
    report = changed(config__sparsity__method="none", ema_test_accuracy=0.75)
    text = words(page_of(fill(tmp_path / "run", report)))
    assert "81.25 % test accuracy with all of 348 kernel weights" in text
    assert "75.00 % test accuracy of the moving average" in text


def test_what_a_run_lacks_is_left_out(run):
    for name in ("metrics.jsonl", "histograms.json"):
        (run / name).unlink()
    text = page_of(run)
    check_alone(text)
    assert "There are no rows in metrics.jsonl" in words(text)
    assert "effective weights" not in text


EVIL = "<script>alert('1')&\"<b>"


def test_names_and_values_are_text(tmp_path):
    report = changed(config__model__name=EVIL, versions__Python=EVIL)
    report["layers"][EVIL] = report["layers"].pop("conv/kernel")
    run = fill(tmp_path / EVIL, report, kernels={EVIL: HISTOGRAM})
    for workdirs in ((run,), (run, fill(tmp_path / "other"))):
        text = page_of(*workdirs)
        check_alone(text)
        assert "<b>" not in re.sub(r'<b style="--share: [\d.]+">', "", text)
        assert EVIL in words(text)


# Two runs.


def test_two_runs_stand_side_by_side(run, tmp_path):
    sparsity = {**SPARSITY, "method": "gmp", "power": 2.0}
    report = changed(test_accuracy=0.875, config__sparsity=sparsity, seed=4)
    report["layers"] = {"conv/kernel": {**LAYER, "zeros": 0}, "new/kernel": LAYER}
    text = page_of(run, fill(tmp_path / "other", report))
    check_alone(text)
    text = words(text)
    assert "A run 81.25 % test accuracy with 67.82 %" in text
    assert "B other 87.50 % test accuracy with 67.82 %" in text
    assert "B is 6.25 points above A, 10 of 160 images." in text
    assert "conv 69.44 % 0.00 % 1,408 4,608 3 / 8 3 / 8 1 / 4 1 / 4" in text
    assert "new - 69.44 % - 1,408 - 3 / 8 - 1 / 4" in text
    assert "mlp 60.00 % - 24 -" in text
    differing, same = text.split(" Settings ")[1].split("The same in both", 1)
    changes = "sparsity.method st3 gmp sparsity.power 3.0 2.0"
    assert differing.strip() == f"A B {changes}"
    assert same.startswith(" model.name net data.name digits batch_size 64 ")


def test_runs_that_agree_are_said_to(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    text = words(page_of(run, fill(tmp_path / "elsewhere" / "run")))
    assert "Both have the same accuracy, on 160 images." in text
    assert "A run 81.25 %" in text
    assert "B run 81.25 %" in text


def test_long_names_of_folders_are_told_once(tmp_path):
    name = "-".join(["digits_st3", *(f"sparsity.begin_epoch={i}" for i in range(9))])
    runs = [fill(tmp_path / f"{name}-{i}") for i in range(2)]
    for run in runs:
        export(run)
    measure_latency(runs)
    text = words(page_of(*runs))
    for i in range(2):
        assert text.count(f"{name}-{i}") == 2  # in the title and at the top
    assert "of dense B bytes of dense" in text
    assert "B One image, one thread" in text


def test_a_latency_has_the_label_of_its_run(run, tmp_path):
    other = fill(tmp_path / "other")
    (other / "latency.json").write_text(json.dumps(latencies(model=1.0)))
    assert "Latency B One image" in words(page_of(run, other))


def test_on_a_narrow_screen_every_number_has_its_name(run, tmp_path):
    for runs in ((run,), (run, fill(tmp_path / "other"))):
        stacked = page_of(*runs).split('class="stacked"')[1].split("</table>")[0]
        cells = re.findall(r"<td[^>]*>", stacked)
        assert len(cells) == 5 * (7 if len(runs) == 1 else 10)
        assert all('data-name="' in cell for cell in cells)


# What is not there, or not whole.


def told(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_that_has_not_ended_is_told(tmp_path, run):
    begun, empty = tmp_path / "begun", tmp_path / "empty"
    for workdir in (begun, empty):
        workdir.mkdir()
    (begun / "config.json").write_text("{}")
    sentence = told(page_of, run, begun)
    assert sentence.startswith(f"the run in {begun} has not ended: ")
    assert sentence.endswith("leaves report.json at the end")
    sentence = f"there is no run in {empty}, as it has no report.json"
    assert told(page_of, empty) == sentence
    assert told(page_of, tmp_path / "nowhere").startswith("there is no folder ")
    assert not (run / "report.html").exists()


def test_a_network_of_the_transformer_is_told(tmp_path):
    weights, path = {"kernel": np.ones((2, 2), np.float32)}, tmp_path / "model.st3"
    st3jax.save_sparse(path, weights, metadata={"network": "transformer"})
    assert "transformer.py, which leaves no report" in told(page_of, tmp_path)
    st3jax.save_sparse(path, weights)
    assert "there is no run in" in told(page_of, tmp_path)
    path.write_text("junk")
    assert "there is no run in" in told(page_of, tmp_path)


@pytest.mark.parametrize("name", ["report.json", "histograms.json", "latency.json"])
@pytest.mark.parametrize("junk", ["", "[1]", "3", "{", "[" * 100000, "\x00"])
def test_a_file_that_is_none_is_told(run, name, junk):
    (run / name).write_text(junk)
    assert told(page_of, run).startswith(f"{run / name} is damaged: ")


@pytest.mark.parametrize("name", sorted({*REPORT} - {"skipped_images"}))
def test_a_report_of_another_version_is_told(tmp_path, name):
    report = {key: value for key, value in REPORT.items() if key != name}
    sentence = told(page_of, fill(tmp_path / "run", report))
    assert f"of another version of this project (KeyError: '{name}'" in sentence


def test_a_ramp_that_is_none_is_told(tmp_path):
    run = fill(tmp_path / "run", changed(config__sparsity__end_epoch=1))
    assert "(FloatingPointError: divide by zero" in told(page_of, run)


def leaves(tree, path=()):
    """The paths to everything in a tree of JSON."""
    yield path
    if not isinstance(tree, dict | list):
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from leaves(value, (*path, key))


ODD = [None, True, -1, 0, 10**40, 1e308, float("nan"), float("inf"), "", "x", [], {}]
PLACES = [path for path in leaves(REPORT) if path]


@given(path=st.sampled_from(PLACES), value=st.sampled_from([*ODD, [[]], {"a": 1}]))
def test_any_damage_is_shown_or_told(tmp_path_factory, path, value):
    report = copy.deepcopy(REPORT)
    node = report
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    run = fill(tmp_path_factory.mktemp("damage") / "run", report)
    (run / "metrics.jsonl").unlink()  # drawing figures takes time
    try:
        text = page_of(run)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017  a page is as good
    else:
        check_alone(text)


# The command.


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    command.main()


def test_the_command_writes_where_it_is_asked_to(run, tmp_path, monkeypatch, capsys):
    other = fill(tmp_path / "other")
    for arguments, out in (
        ((), run / "report.html"),
        ((f"--compare={other}",), run / "report-compare.html"),
        ((f"--out={tmp_path / 'x.html'}",), tmp_path / "x.html"),
    ):
        call(monkeypatch, f"--workdir={run}", *arguments)
        assert capsys.readouterr().out == f"the page is {out}\n"
        check_alone(out.read_text())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--workdir={0}/nothing"], "nothing: name a run's with --workdir=..."),
        (
            ["--workdir={0}/run", "--compare={0}/nothing"],
            "/nothing: name a run's with --compare=...",
        ),
        (["--workdir={0}/run", "--compare={0}"], "there is no run in "),
        (["--workdir={0}/run", "--compare={0}/run"], "is the run of --workdir itself"),
        (["--workdir={0}/run", "--compare={0}/x/../run/"], "the run of --workdir its"),
        (
            ["--workdir={0}/run", "--compare={0}/x/link"],
            "is the run of --workdir itself",
        ),
        (["--workdir={0}/run", "--out={0}/a/b.html"], "(No such file or directory at"),
    ],
)
def test_the_command_ends_in_a_sentence(
    run, tmp_path, monkeypatch, arguments, sentence
):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "link").symlink_to(run)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, *(text.format(tmp_path) for text in arguments))
    assert ended.value.code.startswith("error: ")
    assert sentence in ended.value.code
    assert "\n" not in ended.value.code


def export(run, name="model.onnx"):
    """A network of one multiplication, for any number of images."""
    shape = ["N", 8, 8, 1]
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "x"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    opset = helper.make_opsetid("", 17)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=9)
    (run / "export").mkdir(exist_ok=True)
    onnx.save(model, run / "export" / name)


def test_exported_networks_are_timed(run, tmp_path, monkeypatch, capsys):
    other = fill(tmp_path / "other")
    export(run)
    export(other)
    export(other, "compact.onnx")
    call(monkeypatch, f"--workdir={run}", f"--compare={other}")
    assert capsys.readouterr().out.startswith("the page is ")
    for workdir, files in ((run, ["model"]), (other, ["compact", "model"])):
        found = json.loads((workdir / "latency.json").read_text())
        names = [f"export/{name}.onnx" for name in files]
        assert [row["file"] for row in found["files"]] == names
        assert all(0 < x["fastest"] <= x["milliseconds"] for x in found["files"])
        assert found["engine"].startswith("ONNX Runtime ")
        assert " cores" in found["machine"]
    text = words((run / "report-compare.html").read_text())
    assert "B One image, one thread; ONNX Runtime " in text
    assert "export/compact.onnx" in text
    check_alone(page_of(other))


def test_what_cannot_be_timed_is_told(run, monkeypatch):
    assert measure_latency([run]) == ""
    export(run)
    (run / "export" / "model.onnx").write_text("junk")
    sentence = told(measure_latency, [run])
    assert sentence.startswith(
        f"{run}/export/model.onnx cannot be run by ONNX Runtime ("
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "ONNX Runtime is not installed, and pip install" in measure_latency([run])
    assert not (run / "latency.json").exists()


# What a run records for it.


def test_dead_channels_are_counted():
    kernel = np.zeros((3, 3, 2, 4))
    kernel[1, 1, 0, 2] = kernel[0, 2, 0, 3] = 1
    expected = {"outputs": 4, "dead_outputs": 2, "inputs": 2, "unread_inputs": 1}
    assert dead_channels(kernel, "wwio") == expected
    assert dead_channels(np.moveaxis(kernel, 3, 0), "owwi") == expected
    stacked = np.stack([kernel, np.zeros_like(kernel), np.ones_like(kernel)])
    assert dead_channels(stacked, "swwio") == {
        "outputs": 12,
        "dead_outputs": 6,
        "inputs": 6,
        "unread_inputs": 3,
    }
    heads = np.zeros((5, 2, 3))
    heads[0, 1, 2] = 1
    assert dead_channels(heads, "ioo") == {
        "outputs": 6,
        "dead_outputs": 5,
        "inputs": 5,
        "unread_inputs": 4,
    }


def recorded(workdir, tx, params, method="st3", pattern=""):
    """What is recorded of the weights after one step of nothing."""
    _, opt_state = tx.update(params, tx.init(params), params)
    config = {"sparsity": {"method": method, "pattern": pattern}}
    job = SimpleNamespace(config=ml_collections.ConfigDict(config))
    state = SimpleNamespace(step=1, params=params, opt_state=opt_state)
    histograms.record(workdir, job, state)
    return json.loads((workdir / "histograms.json").read_text())


def test_what_is_not_finite_is_in_no_bin():
    raw = np.float32([np.nan, np.inf, 1, -2])
    found = histograms._histogram(raw, np.where(raw == 1, 0, raw))
    assert (sum(found["raw"]), sum(found["effective"]), found["zeros"]) == (2, 1, 1)
    nothing = histograms._histogram(raw[:2], raw[:2])
    assert sum(nothing["raw"] + nothing["effective"]) == 0


def test_half_done_exports_are_no_files(tmp_path):
    (tmp_path / "export" / ".draft-x").mkdir(parents=True)
    for name in ("model.onnx", ".draft-x/model.onnx"):
        (tmp_path / "export" / name).write_text("")
    assert [path.parent.name for path in exported(tmp_path)] == ["export"]


def test_histograms_are_of_raw_and_of_effective_weights(tmp_path):
    w = jnp.linspace(-1, 1, 32).reshape(4, 8)
    tx = st3jax.ste(optax.sgd(0.0), 0.5)
    found = recorded(tmp_path, tx, {"fc": {"kernel": w, "bias": w[0]}}, "ste")
    assert found["step"] == 1
    assert list(found["kernels"]) == ["fc/kernel"]
    kernel = found["kernels"]["fc/kernel"]
    (threshold,) = kernel.pop("thresholds")
    assert np.sum(np.abs(w) <= threshold) == kernel["zeros"] == 16
    assert kernel["weights"] == 32
    limit = kernel["limit"]
    edges = np.linspace(-limit, limit, 12)
    inside = w[np.abs(w) <= limit]
    kept = inside[np.abs(inside) > threshold]
    assert kernel["raw"] == np.histogram(inside, edges)[0].tolist()
    assert kernel["effective"] == np.histogram(kept, edges)[0].tolist()
    assert sum(kernel["raw"]) == 32
    assert kernel["effective"][5] == 0


def test_thresholds_are_recorded_where_they_are_numbers(tmp_path):
    w = {"kernel": jnp.linspace(-1, 1, 32).reshape(4, 8)}
    sgd = optax.sgd(0.0)
    tx = st3jax.str_(sgd, threshold_optimizer=sgd, initial=-1.0)
    learned = recorded(tmp_path, tx, w, "str_")
    assert learned["kernels"]["kernel"]["thresholds"] == pytest.approx([1 / (1 + np.e)])
    for tx, method, pattern in (
        (st3jax.st3(sgd, 0.5, pattern="2:4"), "st3", "2:4"),
        (st3jax.st3(sgd, 0.0), "st3", ""),
        (st3jax.set_(sgd, 0.5, key=jax.random.key(0), update_every=2), "set_", ""),
        (sgd, "none", ""),
    ):
        found = recorded(tmp_path, tx, w, method, pattern)
        assert found["kernels"]["kernel"]["thresholds"] == []
    zeros = recorded(tmp_path, sgd, {"kernel": jnp.zeros((4, 8))}, "none")
    assert zeros["kernels"]["kernel"]["limit"] == 1.0
    assert sum(zeros["kernels"]["kernel"]["effective"]) == 0
