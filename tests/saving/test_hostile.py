"""Files that were made to do harm, or were harmed: each is refused, and named."""

import copy
import io
import json
import pickle
import re
import struct
import tracemalloc
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

STATE = ff.posterior(
    {"a": jnp.arange(3.0), "b": jnp.ones((2, 2))},
    ff.structures.Diagonal({"a": jnp.ones(3), "b": jnp.ones((2, 2))}),
    prior_precision=1.0,
)


class Fires:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("the file was run",))


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """The members of a good file, by name."""
    path = tmp_path_factory.mktemp("good") / "state.npz"
    ff.save(path, STATE)
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def written(path, members, compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compress) as file:
        for name, content in members if isinstance(members, list) else members.items():
            file.writestr(zipfile.ZipInfo(name), content, compress)
    return path


def refused(path, words, **options):
    """By a ValueError that names the file and the fault."""
    with pytest.raises(ValueError, match=words) as error:
        ff.load(path, **options)
    assert str(error.value).startswith(f"{path} cannot be loaded: ")
    assert len(str(error.value)) < 1000


def with_header(path, members, change):
    header = json.loads(members["header.json"])
    changed = change(header)
    header = header if changed is None else changed
    text = header if isinstance(header, (bytes, str)) else json.dumps(header)
    return written(path, {**members, "header.json": text})


def test_the_good_file_is_good(tmp_path, members):
    assert repr(ff.load(written(tmp_path / "a", members))) == repr(STATE)


# ---- the file


@pytest.mark.parametrize("keep", [0, 2, 30, 200, 0.5, 0.9, 0.999])
def test_a_truncated_file(tmp_path, members, keep):
    raw = written(tmp_path / "a", members).read_bytes()
    (tmp_path / "a").write_bytes(raw[: keep if keep >= 1 else int(len(raw) * keep)])
    refused(tmp_path / "a", "damaged, or no file of ff.save")


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Fires()),
        b"\x93NUMPY\x01\x00" + bytes(100),
        b"PK\x05\x06" + bytes(18),
        b"not a zip" * 100,
    ],
    ids=["pickle", "npy", "empty zip", "text"],
)
def test_another_file(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    refused(tmp_path / "a", r"no file of ff\.save")


def test_every_changed_byte_is_seen_or_harmless(tmp_path, members):
    """Flipped bits raise the one error, or change nothing that is read."""
    raw = written(tmp_path / "a", members).read_bytes()
    for place in range(0, len(raw), 37):
        changed = bytearray(raw)
        changed[place] ^= 0x55
        (tmp_path / "a").write_bytes(bytes(changed))
        try:
            loaded = ff.load(tmp_path / "a")
        except ValueError as error:
            assert "cannot be loaded: " in str(error)
        else:
            assert np.array_equal(loaded.mean["a"], STATE.mean["a"])
            assert repr(loaded) == repr(STATE)


def test_a_file_of_numpy(tmp_path):
    with open(tmp_path / "a", "wb") as file:
        np.savez(file, mean=np.ones(3))
    refused(tmp_path / "a", r"it has no header\.json: it is no file of ff\.save")


def test_what_is_not_there_or_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ff.load(tmp_path / "nowhere")
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        ff.load(tmp_path)


# ---- members


def npy(array, **options):
    out = io.BytesIO()
    np.lib.format.write_array(out, array, **options)
    return out.getvalue()


OBJECTS = np.empty(3, object)
OBJECTS[:] = [Fires()] * 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npy(OBJECTS, allow_pickle=True), r"float64\[3\] by the header"),
        (npy(np.arange(4.0)), "its member has 160 bytes"),
        (npy(np.arange(3)), r"array 0 is not the float64\[3\] of the header"),
        (npy(np.arange(3.0)[:, None]), r"is not the float64\[3\] of the header"),
        (npy(np.arange(3.0).astype(">f8")), r"is not the float64\[3\]"),
        (b"", "its member has 0 bytes"),
        (pickle.dumps(Fires()), "its member has"),
    ],
    ids=["objects", "longer", "integers", "axes", "big end", "empty", "pickle"],
)
def test_arrays_that_are_not_those_of_the_header(tmp_path, members, content, words):
    refused(written(tmp_path / "a", {**members, "0.npy": content}), words)


def test_a_bomb_of_compressed_zeros(tmp_path, members):
    huge = {**members, "0.npy": bytes(10**8)}
    path = written(tmp_path / "a", huge, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**6
    tracemalloc.start()
    refused(path, "is compressed")
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


def test_members_that_claim_more_than_there_is(tmp_path, members):
    """Sizes in the directory of the zip, of a member whose bytes are few."""
    raw = bytearray(written(tmp_path / "a", members).read_bytes())
    place = raw.rindex(b"PK\x01\x02")
    for offset in (20, 24):  # compressed, and not
        raw[place + offset : place + offset + 4] = struct.pack("<I", 2**31)
    (tmp_path / "a").write_bytes(bytes(raw))
    refused(tmp_path / "a", "its members claim")


def test_members_that_lie_over_each_other(tmp_path, members):
    """One array's bytes as many arrays: a bomb without compression."""
    names = [f"{k}.npy" for k in range(50)]
    raw = bytearray(
        written(tmp_path / "a", dict.fromkeys(names, b"x" * 1000)).read_bytes()
    )
    start = raw.index(b"PK\x01\x02")
    first, place = raw[start + 42 : start + 46], start
    for _ in names:  # all begin where the first does
        raw[place + 42 : place + 46] = first
        length = struct.unpack_from("<HHH", raw, place + 28)
        place += 46 + sum(length)
    (tmp_path / "a").write_bytes(bytes(raw))
    refused(tmp_path / "a", "header|damaged")


@pytest.mark.parametrize(
    "name", ["../../outside.npy", "/tmp/outside.npy", "99.npy", "C:\\x.npy", "-1.npy"]
)
def test_names_that_lead_elsewhere(tmp_path, members, name):
    before = sorted(tmp_path.rglob("*"))
    path = written(tmp_path / "a", {**members, name: b"x"})
    refused(path, "its members are not those of its header")
    assert sorted(tmp_path.rglob("*")) == [*before, path]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice(tmp_path, members):
    for name in ("0.npy", "header.json"):
        path = written(tmp_path / "a", [*members.items(), (name, members[name])])
        refused(path, f"two members named '{name}'")


def test_a_member_that_is_missing(tmp_path, members):
    without = {name: x for name, x in members.items() if name != "0.npy"}
    refused(written(tmp_path / "a", without), r"'0\.npy', and no such member")


# ---- the header


def first_array(header, item):
    header["arrays"][0] = item


def deep(depth):
    node = "null"
    return '{"list": [' * depth + node + "]}" * depth


def placed(header, node):
    header["state"]["fields"]["mean"] = node


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: b"\xff\xfe not JSON", "is no JSON"),
        (lambda h: "", "is no JSON"),
        (lambda h: "__import__('os').getcwd()", "is no JSON"),
        (lambda h: "[1, 2]", "is a list, not an object"),
        (lambda h: '{"format": 1, "format": 1}', "a key twice"),
        (lambda h: '{"format": NaN}', "the number NaN"),
        (lambda h: '{"format": ' + "9" * 5000 + "}", "is no JSON"),
        (lambda h: "[" * 10**6, "nested too deep|is no JSON"),
        (lambda h: h.update(format=2), "of format 2, and this version reads up to 1"),
        (lambda h: h.update(format="1"), "no format number"),
        (lambda h: h.update(format=True), "no format number"),
        (lambda h: h.update(format=-1), "no format number"),
        (lambda h: h.update(arrays=None), "lists no arrays"),
        (lambda h: h.update(tables=3), "its tables are no list"),
        (lambda h: h.update(state=None), "array 0 is of no part of the state"),
        (lambda h: first_array(h, ["float64", [-3]]), r"the shape \[-3\]"),
        (lambda h: first_array(h, ["float64", [True]]), r"the shape \[True\]"),
        (lambda h: first_array(h, ["float64", [3.0]]), r"the shape \[3.0\]"),
        (lambda h: first_array(h, ["float64", [10**15]]), "its member has"),
        (lambda h: first_array(h, ["float64", [2**40] * 9]), "its member has"),
        (lambda h: first_array(h, ["float64", [10**400]]), r"the shape"),
        (lambda h: first_array(h, ["float64", [1] * 100]), r"the shape"),
        (lambda h: first_array(h, ["float32", [3]]), "its member has"),
        (
            lambda h: first_array(h, ["object", [3]]),
            "the dtype 'object', which is unknown",
        ),
        (lambda h: first_array(h, ["|O", [3]]), "which is unknown"),
        (lambda h: first_array(h, [["f8"], [3]]), "which is unknown"),
        (lambda h: first_array(h, "float64"), "no dtype and shape"),
        (
            lambda h: placed(h, {"type": "os.system", "fields": {}}),
            "'os.system', unknown",
        ),
        (lambda h: placed(h, {"type": ["x"], "fields": {}}), "unknown here"),
        (
            lambda h: placed(h, {"type": "posteriors.Posterior", "fields": {"x": 1}}),
            "'x'",
        ),
        (
            lambda h: placed(h, {"type": "posteriors.Posterior", "fields": []}),
            "no fields",
        ),
        (lambda h: h["state"].update(fields={}), "is no Posterior.*: 'mean'"),
        (lambda h: placed(h, {"array": 99}), "is array 99, of"),
        (lambda h: placed(h, {"array": -1}), "is array -1, of"),
        (lambda h: placed(h, {"array": "0"}), "is array 0, of"),
        (lambda h: placed(h, {"list": [{"array": 0}] * 2}), "another name has already"),
        (lambda h: placed(h, {"list": 3}), "has no parts"),
        (lambda h: placed(h, {"table": 0}), "is table 0, of 0"),
        (lambda h: placed(h, {"dict": [["a", 1], ["a", 2]]}), "is no dict of names"),
        (lambda h: placed(h, {"dict": [[["a"], 1]]}), "is no dict of names"),
        (lambda h: placed(h, {"dict": {"a": 1}}), "is no dict of names"),
        (lambda h: placed(h, {"float": "1 + 1"}), "is no float"),
        (lambda h: placed(h, {"float": 1}), "is no float"),
        (lambda h: placed(h, [1]), "is a list in the header"),
        (lambda h: placed(h, 0.5), "is a float in the header"),
        (lambda h: placed(h, {"eval": "1"}), "is none of the nodes"),
        (
            lambda h: placed(h, {"likelihood": "eval", "arguments": None}),
            "'eval', unknown",
        ),
        (
            lambda h: placed(
                h, {"likelihood": "gaussian", "arguments": {"dict": [["x", 1]]}}
            ),
            "cannot be made",
        ),
        (
            lambda h: placed(
                h, {"likelihood": "gaussian", "arguments": {"dict": [["scale", -1]]}}
            ),
            "cannot be made: .*positive",
        ),
        (
            lambda h: placed(
                h,
                {
                    "likelihood": "student_t",
                    "arguments": {"dict": [["df", {"list": []}]]},
                },
            ),
            "cannot be made",
        ),
        (
            lambda h: placed(
                h,
                {"likelihood": "poisson", "arguments": {"dict": [["eval", "exit()"]]}},
            ),
            "cannot be made",
        ),
        (lambda h: placed(h, {"array": 0, "key": "pickle"}), "a key of 'pickle'"),
        (lambda h: placed(h, {"array": 0, "key": "rbg"}), "is no key of rbg"),
        (lambda h: placed(h, {"function": "os.system"}), "holds no functions"),
        (lambda h: placed(h, {"treedef": {"array": 0}}), "no part|cannot be"),
    ],
)
def test_headers(tmp_path, members, change, words):
    refused(with_header(tmp_path / "a", members, change), words)


@pytest.mark.parametrize("depth", [2_000, 100_000])
def test_a_header_that_is_nested_too_deep(tmp_path, members, depth):
    def change(header):
        text = json.dumps(header)
        return text.replace('"state": {', f'"state": {deep(depth)}, "was": {{', 1)

    refused(with_header(tmp_path / "a", members, change), "nested too deep")


def test_choices_that_are_no_texts(tmp_path, members):
    flow = ff.fisher_flow(lambda w, x: x @ w, ff.likelihoods.bernoulli())
    for choices in (3, {"structure": ["full()"]}, [["a", "b"]]):
        path = with_header(
            tmp_path / "a", members, lambda h, c=choices: h.update(flow=c)
        )
        refused(path, "are no texts", flow=flow)


def test_a_table_of_layers_with_other_types(tmp_path):
    layers = ff.layers.find_layers(
        lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((4, 3))
    )
    ff.save(tmp_path / "good", layers)
    with zipfile.ZipFile(tmp_path / "good") as file:
        members = {name: file.read(name) for name in file.namelist()}
    good = json.loads(members["header.json"])
    fields = good["tables"][0]["fields"]
    assert ff.load(written(tmp_path / "a", members)) == layers
    for name in set(fields) - {"tree"}:
        for wrong in (
            {"list": []},
            {"float": "0x1p0"},
            {"tuple": [{"tuple": []}, "a", 1]},
        ):
            header = copy.deepcopy(good)
            header["tables"][0]["fields"][name] = wrong
            path = with_header(tmp_path / "a", members, lambda h, new=header: new)
            refused(path, rf"state\.{name} is not what a Layers has there")
