"""The store of samples: nothing is lost, whatever comes in and whenever the process ends."""

import errno
import io
import json
import os
import shutil
import signal
import time

import cv2
import numpy as np
import pytest

from waste_seg_ros.data.sample import CLASSES, DataError, Sample
from waste_seg_ros.data.sources import open_data
from waste_seg_ros.data.synthetic import synthetic_sample
from waste_seg_ros.fewshot import store as stores
from waste_seg_ros.fewshot.labels import (
    Label,
    LabelError,
    check_class_name,
    mask_at_click,
    mask_of_box,
    mask_of_polygon,
)
from waste_seg_ros.fewshot.store import Source, Store, StoreDataset, StoreError, split

SIZE = (64, 48)


def picture(seed=0, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)


def block(x, y, w, h, size=SIZE):
    mask = np.zeros(size[::-1], bool)
    mask[y : y + h, x : x + w] = True
    return mask


def add(store, seed=0, name="glass", box=(4, 4, 20, 20), **more):
    return store.add(picture(seed), [Label(name, block(*box))], **more)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


# --- what goes in comes out -----------------------------------------------------------------------


def test_a_sample_comes_back_as_it_was_given(store):
    source = Source(1_700_000_000_123_456_789, "camera", "/line1/image_raw", "17")
    labels = [Label("glass", block(4, 4, 20, 20), "polygon"), Label("paper", block(30, 5, 9, 9))]
    kept = store.add(picture(), labels, source)
    assert kept.notes == ()
    again = Store(store.root)
    entry = again.entry(kept.entry.id)
    assert (entry.source, entry.size, entry.complete) == (source, SIZE, False)
    assert [(i.class_name, i.how, i.pixels) for i in entry.items] == [
        ("glass", "polygon", 400),
        ("paper", "mask", 81),
    ]
    image, instances = again.read(entry.id)
    assert np.array_equal(image, picture())
    assert np.array_equal(instances == 1, labels[0].mask)
    assert np.array_equal(instances == 2, labels[1].mask)
    assert {n: (c.items, len(c.images)) for n, c in again.classes().items()} == {
        "glass": (1, 1),
        "paper": (1, 1),
    }


def test_a_call_that_is_repeated_stores_nothing_twice(store):
    first = add(store)
    second = add(store)
    assert second.entry.id == first.entry.id
    assert "there already" in second.notes[0]
    assert len(store.entries()) == 1


def test_samples_are_edited_and_deleted(store):
    one, two = add(store, 1).entry, add(store, 2).entry
    changed = store.edit(one.id, classes={1: "jar"}).entry
    assert (changed.id, changed.classes) == (one.id, ("jar",))
    store.edit(one.id, labels=[Label("jar", block(0, 0, 8, 8))], complete=True)
    entry = store.entry(one.id)
    assert entry.complete
    assert np.array_equal(store.read(one.id)[1] > 0, block(0, 0, 8, 8))
    assert sorted(p.name for p in (store.root / one.id).iterdir()) == sorted(
        [*entry.files, "sample.json"]
    )
    store.delete(two.id)
    assert [e.id for e in store.entries()] == [one.id]
    for call in (store.delete, store.entry, lambda i: store.edit(i, complete=True)):
        with pytest.raises(StoreError, match=two.id):
            call(two.id)
    with pytest.raises(StoreError, match="no item 7"):
        store.edit(one.id, classes={7: "jar"})
    with pytest.raises(StoreError, match="no id"):
        store.delete("../store")


def test_data_read_from_a_store_are_unknown_where_nobody_labelled(store):
    add(store, name="bottle")
    data = open_data(f"store:{store.root}", ("paper", "bottle"))
    sample = data[0]
    assert np.array_equal(sample.image, picture())
    assert np.array_equal(sample.labels, np.where(block(4, 4, 20, 20), 2, 255))
    assert np.array_equal(sample.instances, block(4, 4, 20, 20))
    add(store, name="glass", box=(40, 4, 9, 9), complete=True)
    sample = open_data(f"store:{store.root}", ("paper", "bottle"))[0]
    assert np.array_equal(np.unique(sample.labels), [0, 2, 254])
    assert np.array_equal(np.unique(sample.instances), [0, 1, 2])
    with pytest.raises(DataError, match="no such folder"):
        open_data(f"store:{store.root}-not")
    with pytest.raises(DataError, match="has no samples"):
        StoreDataset(store.root, only=["000009-00000000"])


def test_an_exported_set_is_what_the_store_gives(store, tmp_path):
    add(store, 1, "paper")
    add(store, 2, "bottle", complete=True)
    add(store, 2, "glass jar", (40, 4, 9, 9))
    count = store.export_coco(tmp_path / "coco")
    assert count == 2
    classes = ("paper", "bottle", "glass jar")
    read = open_data(f"coco:{tmp_path}/coco/annotations.json:{tmp_path}/coco", classes, strict=True)
    for ours, theirs in zip(StoreDataset(store.root, classes), read, strict=True):
        assert np.array_equal(ours.image, theirs.image)
        assert np.array_equal(ours.labels, theirs.labels)
        assert np.array_equal(ours.instances > 0, theirs.instances > 0)
    with pytest.raises(StoreError, match="exists"):
        store.export_coco(tmp_path / "coco")
    with pytest.raises(StoreError, match="no such folder"):
        Store(tmp_path / "none").export_coco(tmp_path / "other")


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((48, 64), np.uint8), "empty"),
        (block(0, 0, 3, 2), "only 6 pixels"),
        (block(4, 4, 20, 20, (48, 64)), "48x64, its image 64x48"),
        (np.full((48, 64), np.nan), "not finite"),
        (np.zeros((48, 64, 3), np.uint8), "numbers"),
    ],
)
def test_a_mask_that_cannot_be_is_refused_and_nothing_stored(store, mask, message):
    with pytest.raises(LabelError, match=message):
        store.add(picture(), [Label("glass", mask)])
    assert store.entries() == []


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([(np.nan, 1), (20, 1), (20, 20)], "not finite"),
        ([(1, np.inf), (20, 1), (20, 20)], "not finite"),
        ([(1, 1), (20, 20)], "three"),
        ([(1, 1), (30, 1), (50, 1)], "pixels"),
        ([(-90, -90), (-80, -90), (-80, -80)], "only 0 pixels"),
        ([(1, 1), (1e9, 1), (20, 20)], "far outside"),
    ],
)
def test_an_outline_that_cannot_be_is_refused(points, message):
    with pytest.raises(LabelError, match=message):
        mask_of_polygon(points, SIZE)


def test_outline_box_and_click_give_the_item():
    assert np.array_equal(
        mask_of_polygon([(4, 4), (23, 4), (23, 23), (4, 23)], SIZE), block(4, 4, 20, 20)
    )
    proposals = block(4, 4, 20, 20).astype(np.uint16) * 3 + block(40, 4, 20, 20) * np.uint16(7)
    assert np.array_equal(mask_at_click((10, 10), proposals), proposals == 3)
    assert np.array_equal(mask_at_click((37, 10), proposals), proposals == 7)
    for point, message in (((30, 40), "no item"), ((90, 4), "outside"), ((np.nan, 1), "finite")):
        with pytest.raises(LabelError, match=message):
            mask_at_click(point, proposals)
    assert np.array_equal(mask_of_box((3, 3, 22, 22), picture(), proposals), proposals == 3)
    # Without a proposal: what stands out from the belt.
    image = np.full((120, 160, 3), 60, np.uint8)
    cv2.circle(image, (80, 60), 25, (200, 40, 30), -1)
    image = image + picture(1, (160, 120)) // 16
    truth = np.hypot(np.arange(160) - 80, np.arange(120)[:, None] - 60) <= 25
    found = mask_of_box((48, 28, 64, 64), image)
    assert (found & truth).sum() / (found | truth).sum() > 0.9
    for box, message in (
        ((0, 0, 160, 120), "whole image"),
        ((200, 0, 9, 9), "outside"),
        ((np.nan, 0, 9, 9), "finite"),
    ):
        with pytest.raises(LabelError, match=message):
            mask_of_box(box, image)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("a/b", "'/'"),
        ("a\\b", "cannot have"),
        ("../../etc", "'/'"),
        ("x" * 300, "300 characters"),
        ("gla\nss", "U\\+000A"),
        ("gla\x00ss", "U\\+0000"),
        ("gla\u202ess", "U\\+202E"),
        ("gla\ud800ss", "U\\+D800"),
        ("paper,glass", "','"),
        ("---", "letter"),
        ("-v", "begin"),
        ("Background", "reserved"),
    ],
)
def test_a_class_name_that_would_do_harm_is_refused(store, name, message):
    with pytest.raises(LabelError, match=message):
        add(store, name=name)
    assert store.entries() == []


def test_class_names_of_any_script_are_kept_and_spelled_alike(store, tmp_path):
    for name in ("стекло", "ガラス瓶", "verre brisé", "glass-2.b_3"):
        assert add(store, name=name, seed=len(name)).entry.classes == (name,)
    assert Store(store.root).spelled("СТЕКЛО") == "стекло"
    assert check_class_name("Paper", CLASSES) == "paper"
    assert check_class_name("  glass   jar ") == "glass jar"
    # One letter and a letter with an accent put on it look alike, and are alike.
    assert check_class_name("verre brise\u0301") == "verre bris\u00e9"
    store.export_coco(tmp_path / "coco")
    names = {
        c["name"]
        for c in json.loads((tmp_path / "coco/annotations.json").read_text())["categories"]
    }
    assert "ガラス瓶" in names


# --- contradictions -------------------------------------------------------------------------------


def test_of_contradictory_labels_the_last_counts_and_it_is_said(store):
    first = add(store, name="paper", box=(4, 4, 20, 20)).entry
    kept = add(store, name="glass", box=(6, 6, 20, 20))
    assert len(kept.notes) == 1
    for part in ("'glass'", "'paper'", first.id, "given last"):
        assert part in kept.notes[0]
    classes = ("paper", "glass")
    sample = StoreDataset(store.root, classes)[0]
    assert np.array_equal(sample.labels == 2, block(6, 6, 20, 20))
    assert not (sample.labels == 1).any()  # what is left of it is unknown
    assert set(np.unique(sample.instances)) == {0, 1}
    # To edit the older makes it the last; to delete it brings back nothing else.
    assert "given last" in store.edit(first.id, classes={1: "paper"}).notes[0]
    assert np.array_equal(StoreDataset(store.root, classes)[0].labels == 1, block(4, 4, 20, 20))
    store.delete(first.id)
    assert np.array_equal(StoreDataset(store.root, classes)[0].labels == 2, block(6, 6, 20, 20))
    # The same class, or another item beside it, is no contradiction.
    assert add(store, name="glass", box=(5, 5, 20, 20)).notes == ()
    assert add(store, name="nylon", box=(40, 5, 9, 9)).notes == ()


def test_which_was_given_last_does_not_hang_on_the_clock(store, monkeypatch):
    add(store, name="paper")
    monkeypatch.setattr(time, "time", lambda: 0.0)

    class Back(stores.datetime):
        @classmethod
        def now(cls, zone=None):
            return cls(1970, 1, 1, tzinfo=zone)

    monkeypatch.setattr(stores, "datetime", Back)
    kept = add(store, name="glass").entry
    assert kept.added.startswith("1970")
    entries = store.entries()
    assert [e.classes for e in entries] == [("paper",), ("glass",)]
    assert entries[0].id < entries[1].id
    assert (StoreDataset(store.root, ("glass",))[0].labels == 1).any()


def test_samples_of_one_picture_or_track_are_on_one_side(store):
    for seed in range(12):
        add(store, seed, "glass")
        add(store, seed, "paper", (40, 4, 9, 9))
    store_notes = split(store.entries())[2]
    assert store_notes == ()
    learned, out, _ = split(store.entries(), 0.3)
    images = [{store.entry(i).image_digest for i in side} for side in (learned, out)]
    assert images[0] and images[1] and not images[0] & images[1]
    assert len(learned) + len(out) == 24
    # Others that come later do not move them.
    add(store, 77, "glass")
    assert set(out) <= set(split(store.entries(), 0.3)[1])

    for seed in (100, 101, 102):
        add(store, seed, "jar", source=Source(track="9"))
    learned, out, notes = split(store.entries(), 0.5)
    jars = {e.id for e in store.entries() if "jar" in e.classes}
    assert jars <= set(learned)
    assert "'jar'" in notes[0] and "another picture" in notes[0]


# --- damage ---------------------------------------------------------------------------------------


def test_damage_is_named_and_the_rest_is_read(store):
    good, bad, worse = (add(store, seed).entry for seed in range(3))
    path = store.root / bad.id / "image.png"
    path.write_bytes(path.read_bytes()[:-20])
    (store.root / worse.id / "sample.json").write_text('{"format": 1}')
    (store.root / "notes").mkdir()
    entries, problems = store.scan()
    assert [e.id for e in entries] == [good.id, bad.id]
    assert any(worse.id in p and "missing" in p for p in problems)
    with pytest.raises(StoreError, match="SHA-256"):
        store.read(bad.id)
    data = open_data(f"store:{store.root}")
    assert [s.name for s in data] == [good.id]
    assert any(bad.id in p for p in data.problems)
    with pytest.raises(DataError):
        open_data(f"store:{store.root}", strict=True)
    store.delete(worse.id)
    store.delete(bad.id)
    assert add(store, 1).entry.id not in (bad.id, worse.id)


@pytest.mark.parametrize(
    "files", [{"../../x.png": "0"}, {"image.png": "0", "/etc/passwd": "0"}, {"image.png": "0"}]
)
def test_a_sample_that_names_files_elsewhere_is_refused(store, files):
    entry = add(store).entry
    path = store.root / entry.id / "sample.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "files": files}))
    with pytest.raises(StoreError, match="files"):
        store.entry(entry.id)


def test_two_processes_take_turns(store, monkeypatch):
    add(store)
    monkeypatch.setattr(stores, "_WAIT", 0.1)
    with (
        stores.held(store.root / ".lock"),
        pytest.raises(StoreError, match=f"another process \\({os.getpid()}\\)"),
    ):
        add(store, 1)
    assert add(store, 1).entry.order == 2


# --- killed, and out of space ---------------------------------------------------------------------


class Trap:
    """Comes down at the n-th call that changes something on the disk."""

    def __init__(self, number, spring):
        self.number, self.spring, self.count = number, spring, 0

    def step(self):
        self.count += 1
        return self.count >= self.number

    def set(self):
        for name in ("mkdir", "open", "fsync", "chmod", "replace", "rename", "unlink", "rmdir"):
            setattr(os, name, self._before(getattr(os, name)))
        plain, trap = io.open, self

        class Raw(io.FileIO):
            def write(self, data):
                if trap.step():
                    super().write(bytes(data)[: len(data) // 2])
                    trap.spring("write")
                return super().write(data)

        def opened(file, mode="r", *args, **more):
            if "w" not in mode:
                return plain(file, mode, *args, **more)
            stream = io.BufferedWriter(Raw(file, "w"), 1 << 16)
            return stream if "b" in mode else io.TextIOWrapper(stream)

        io.open = opened

    def _before(self, call):
        def trapped(*args, **more):
            if self.step():
                self.spring(call.__name__)
            return call(*args, **more)

        return trapped


def kill(_):
    os.kill(os.getpid(), signal.SIGKILL)


def full(call):
    if call in ("write", "mkdir", "fsync", "open"):  # a full disk lets go and renames still
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_trap(number, spring, action):
    """Run in a process of its own; its exit code.

    0 done and the trap not reached, 2 done in spite of it, 3 refused and unchanged, 4 changed but
    not confirmed by the disk, -9 killed.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            trap = Trap(number, spring)
            trap.set()
            action()
            code = 0 if trap.count < number else 2
        except StoreError as error:
            code = 3 if "nothing was changed" in str(error) else 4
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


ACTIONS = {
    "add": lambda store, entry: add(store, 5, "nylon"),
    "edit": lambda store, entry: store.edit(
        entry.id, labels=[Label("jar", block(1, 1, 9, 9))], complete=True
    ),
    "rename": lambda store, entry: store.edit(entry.id, classes={1: "jar"}),
    "delete": lambda store, entry: store.delete(entry.id),
}


def contents(root):
    """Everything that a store says, by sample."""
    store = Store(root)
    entries, problems = store.scan()
    assert problems == []
    found = {}
    for entry in entries:
        image, instances = store.read(entry.id)
        found[entry.id] = (entry.classes, entry.complete, image.tobytes(), instances.tobytes())
    return found


@pytest.mark.parametrize("spring", [kill, full])
@pytest.mark.parametrize("action", ACTIONS)
def test_killed_or_out_of_space_at_any_write_nothing_is_lost(tmp_path, action, spring):
    base = Store(tmp_path / "base")
    add(base, 1)
    entry = add(base, 2).entry
    before = contents(base.root)
    shutil.copytree(base.root, tmp_path / "after")
    ACTIONS[action](Store(tmp_path / "after"), entry)
    after = list(contents(tmp_path / "after").values())  # an added sample's id is drawn
    seen = set()
    for number in range(1, 200):
        root = tmp_path / f"{number}"
        shutil.copytree(base.root, root)
        code = in_trap(number, spring, lambda root=root: ACTIONS[action](Store(root), entry))
        now = contents(root)
        assert now == before or list(now.values()) == after, f"at change {number}"
        seen.add(code)
        assert code != 3 or now == before, f"at change {number}"
        assert code not in (0, 2, 4) or list(now.values()) == after, f"at change {number}"
        if code == 0:
            break
        # The next change works, and clears up.
        store = Store(root)
        store.edit(next(iter(now)), complete=True)
        for path in root.iterdir():
            assert path.name == ".lock" or not path.name.startswith("."), f"{path} is left over"
            if path.is_dir():
                assert {p.name for p in path.iterdir()} == {
                    *store.entry(path.name).files,
                    "sample.json",
                }
    assert number > 5
    assert seen == {-9, 0} if spring is kill else {0, 3} <= seen <= {0, 2, 3, 4}


def test_a_disk_that_is_full_indeed_refuses_and_keeps(store):
    """The kernel's own refusal, by a limit on the size of files."""
    import resource

    add(store, 1)
    before = contents(store.root)
    big = Label("glass", block(4, 4, 200, 200, (640, 480)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(StoreError, match="nothing was changed"):
            store.add(picture(3, (640, 480)), [big])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert contents(store.root) == before
    assert len(list(store.root.iterdir())) == 2
    store.add(picture(3, (640, 480)), [big])
    assert len(store.entries()) == 2


def test_a_scene_with_all_its_items_goes_through_unchanged(store):
    scene = synthetic_sample(930001, 0, (160, 120))
    labels = [
        Label(CLASSES[int(scene.labels[scene.instances == k][0]) - 1], scene.instances == k)
        for k in np.unique(scene.instances)
        if k and (scene.instances == k).sum() >= 24 and scene.labels[scene.instances == k][0] < 200
    ]
    store.add(scene.image, labels, complete=True)
    read = StoreDataset(store.root)[0]
    assert isinstance(read, Sample)
    truth = np.zeros_like(scene.labels)
    for label in labels:
        truth[label.mask] = CLASSES.index(label.class_name) + 1
    assert len(labels) > 0
    assert np.array_equal(read.labels, truth)
