"""Targets come from the testbed's table, or from the web, which serves errors, half files and non-images as well."""

import hashlib
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from dori_utils.core import prompt_lists, targets
from dori_utils.core.prompt_lists import PromptList, download_targets
from dori_utils.core.tables import read_pairs
from dori_utils.core.targets import load_targets, read_targets
from dori_utils.materials import FolderMaterials

NEMO = Path(__file__).parents[2] / "shared" / "data" / "nemo"
PATIENCE = 300.0  # seconds: no test waits so long, unless something is broken
FAST = dict(backoff=0.01, timeout=PATIENCE, progress=False)


def image_bytes(color, size=(40, 30), mode="RGB", format="PNG"):
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, format)
    return buffer.getvalue()


class Web:
    """An HTTP server on this machine. `pages` maps a path to a body, or to a list of answers, one for each request.

    An answer is bytes (sent with 200), an int (a status), or ("cut", bytes): a body that breaks off.
    """

    def __init__(self):
        self.pages, self.requests = {}, []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def _answer(self, path):
        self.requests.append(path)
        page = self.pages.get(path, 404)
        return (page.pop(0) if len(page) > 1 else page[0]) if isinstance(page, list) else page

    def _handler(web):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                answer = web._answer(self.path)
                cut = isinstance(answer, tuple)
                body = answer[1] if cut else answer if isinstance(answer, bytes) else b"sorry"
                self.send_response(answer if isinstance(answer, int) else 200)
                self.send_header("Content-Length", str(len(body) + 1000 * cut))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        return Handler


@pytest.fixture
def web():
    web = Web()
    yield web
    web.close()


@pytest.fixture
def publish(web, monkeypatch):
    """Publish a prompt list "tiny" with one memorized row for each image path, and one control."""

    def publish(*paths, control="/control.png"):
        rows = [f'{i};"Caption; number {i}";{web.url}{path};{"VM" if i % 2 == 0 else "TM"};0.9;0.9;{100 + i}'
                for i, path in enumerate(paths)]  # fmt: skip
        memorized = "\n".join([";Caption;URL;type;mean_sscd;max_sscd;Index", *rows, ""]).encode()
        controls = f";Caption;URL;Index\n0;None;{web.url}{control};100\n".encode()
        web.pages |= {"/lists/memorized.csv": memorized, "/lists/controls.csv": controls}
        web.pages.setdefault(control, image_bytes("blue"))
        lists = (
            PromptList("memorized.csv", hashlib.sha256(memorized).hexdigest()),
            PromptList("controls.csv", hashlib.sha256(controls).hexdigest(), kind="control"),
        )
        monkeypatch.setitem(prompt_lists.PROMPT_LISTS, "tiny", lists)
        return f"{web.url}/lists"

    return publish


def leftovers(folder):
    return list(folder.rglob("*.part"))


def test_a_published_list_with_its_images_becomes_targets(web, publish, tmp_path):
    web.pages |= {"/a.png": image_bytes("red"), "/b.jpg": image_bytes("green", format="JPEG")}
    dead = download_targets("tiny", tmp_path, base_url=publish("/a.png", "/b.jpg"), **FAST)
    assert dead.empty and pd.read_csv(tmp_path / "dead_images.csv").empty

    vm, tm, control = load_targets("tiny", folder=tmp_path)
    assert (vm.id, vm.kind, vm.prompt, vm.duplicates) == ("tiny-vm-100", "VM", "Caption; number 0", None)
    assert vm.image.mode == "RGB" and vm.image.size == (40, 30) and vm.image.getpixel((0, 0)) == (255, 0, 0)
    assert tm.kind == "TM" and (tmp_path / "images" / "tiny-tm-101.jpeg").read_bytes() == web.pages["/b.jpg"]
    assert (control.id, control.kind, control.prompt) == ("tiny-control-100", "control", "None")
    assert [target.id for target in load_targets("tiny", kind="TM", folder=tmp_path)] == ["tiny-tm-101"]
    assert not leftovers(tmp_path)


def test_dead_images_are_listed_with_the_reason_not_skipped(web, publish, tmp_path):
    whole = image_bytes("red", size=(200, 200), format="JPEG")
    web.pages |= {
        "/gone.png": 404,
        "/broken.png": 500,
        "/cut.png": ("cut", image_bytes("red")),
        "/page.html": b"<html>This image was removed</html>",
        "/half.jpg": whole[: len(whole) // 2],
        "/pixel.gif": image_bytes(0, size=(1, 1), mode="L", format="GIF"),
        "/good.png": image_bytes("red"),
    }
    paths = [path for path in web.pages]
    dead = download_targets("tiny", tmp_path, base_url=publish(*paths), **FAST)

    reasons = dict(zip(dead["url"].str.removeprefix(web.url), dead["reason"], strict=True))
    assert set(reasons) == set(paths) - {"/good.png"}
    assert reasons["/gone.png"] == "HTTP 404 Not Found"
    assert reasons["/broken.png"] == "HTTP 500 Internal Server Error"
    assert "IncompleteRead" in reasons["/cut.png"]
    assert "not an image" in reasons["/page.html"] and "not an image" in reasons["/half.jpg"]
    assert reasons["/pixel.gif"] == "only 1 x 1 pixels"
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "dead_images.csv"), dead)

    found = load_targets("tiny", folder=tmp_path)
    assert len(found) == len(paths) + 1  # every prompt stays
    assert {target.id for target in found if target.image} == {"tiny-vm-106", "tiny-control-100"}
    assert len(list((tmp_path / "images").iterdir())) == 2 and not leftovers(tmp_path)


def test_what_may_pass_is_tried_again_and_what_will_not_is_not(web, publish, tmp_path):
    good = image_bytes("red")
    web.pages |= {"/busy.png": [503, 429, good], "/cut.png": [("cut", good), good], "/gone.png": 404, "/text": b"hello"}
    base_url = publish("/busy.png", "/cut.png", "/gone.png", "/text")
    web.pages["/lists/memorized.csv"] = [500, ("cut", b";Caption"), web.pages["/lists/memorized.csv"]]
    dead = download_targets("tiny", tmp_path, base_url=base_url, **FAST)
    assert set(dead["id"]) == {"tiny-vm-102", "tiny-tm-103"}
    counts = {path: web.requests.count(path) for path in ("/busy.png", "/cut.png", "/gone.png", "/text")}
    assert counts == {"/busy.png": 3, "/cut.png": 2, "/gone.png": 1, "/text": 1}


def test_waits_double_between_tries(web, monkeypatch):
    waits = []
    monkeypatch.setattr(prompt_lists.time, "sleep", waits.append)
    web.pages["/busy"] = 503
    with pytest.raises(prompt_lists.requests.HTTPError):
        prompt_lists._get(f"{web.url}/busy", attempts=4, backoff=1.0, timeout=PATIENCE)
    assert waits == [1.0, 2.0, 4.0]


def test_a_host_that_does_not_exist_or_answer_is_a_reason(publish, web, tmp_path):
    base_url = publish("/a.png")
    with socket.socket() as silent:  # a port that is taken, so that nobody else gets it, and refuses everyone
        silent.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{silent.getsockname()[1]}/a.png".encode()
        memorized = web.pages["/lists/memorized.csv"].replace(f"{web.url}/a.png".encode(), nobody)
        web.pages["/lists/memorized.csv"] = memorized
        lists = prompt_lists.PROMPT_LISTS["tiny"]
        prompt_lists.PROMPT_LISTS["tiny"] = (
            PromptList("memorized.csv", hashlib.sha256(memorized).hexdigest()),
            lists[1],
        )
        dead = download_targets("tiny", tmp_path, base_url=base_url, **FAST)
    assert dead["reason"].str.startswith("ConnectionError").tolist() == [True]


def test_an_endless_answer_is_cut(web, publish, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_lists, "MAX_BYTES", 100_000)
    web.pages["/big.bmp"] = image_bytes("red", size=(300, 300), format="BMP")
    dead = download_targets("tiny", tmp_path, base_url=publish("/big.bmp"), **FAST)
    assert dead["reason"].tolist() == ["larger than 100000 bytes"]


def test_a_second_call_keeps_what_is_there_and_tries_the_dead_again(web, publish, tmp_path):
    web.pages |= {"/a.png": image_bytes("red"), "/b.png": 404}
    base_url = publish("/a.png", "/b.png")
    assert len(download_targets("tiny", tmp_path, base_url=base_url, **FAST)) == 1
    web.pages["/b.png"] = image_bytes("green")
    web.requests.clear()
    assert download_targets("tiny", tmp_path, base_url=base_url, **FAST).empty
    assert web.requests == ["/b.png"]
    assert pd.read_csv(tmp_path / "dead_images.csv").empty


def test_prompts_alone_can_be_had(web, publish, tmp_path):
    download_targets("tiny", tmp_path, base_url=publish("/a.png"), images=False, **FAST)
    assert all(path.startswith("/lists/") for path in web.requests)
    assert [target.image for target in load_targets("tiny", folder=tmp_path)] == [None, None]


def test_a_list_that_is_not_the_published_one_is_refused_and_not_kept(web, publish, tmp_path):
    base_url = publish("/a.png")
    web.pages["/lists/memorized.csv"] += b"one more row\n"
    with pytest.raises(OSError, match=f"{base_url}/memorized.csv is not the published list.*SHA-256"):
        download_targets("tiny", tmp_path, base_url=base_url, **FAST)
    assert not (tmp_path / "memorized.csv").exists() and not leftovers(tmp_path)


def test_a_list_that_cannot_be_had_says_why(web, publish, tmp_path):
    base_url = publish("/a.png")
    web.pages["/lists/controls.csv"] = 403
    with pytest.raises(OSError, match="Cannot download .*/controls.csv: HTTP 403 Forbidden. Check the network"):
        download_targets("tiny", tmp_path, base_url=base_url, **FAST)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_download_leaves_whole_files_only_and_resumes(web, publish, tmp_path, monkeypatch, stop):
    paths = [f"/{i}.png" for i in range(8)]
    web.pages |= {path: image_bytes("red") for path in paths}
    base_url = publish(*paths)
    write_bytes, written = Path.write_bytes, []

    def failing(path, data):
        written.append(path)
        if len(written) == 5:  # two lists, two images, then half a file
            write_bytes(path, data[: len(data) // 2])
            raise stop
        return write_bytes(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", failing)
        with pytest.raises((KeyboardInterrupt, OSError)):
            download_targets("tiny", tmp_path, base_url=base_url, workers=1, **FAST)
    assert not leftovers(tmp_path) and not (tmp_path / "dead_images.csv").exists()
    files = list((tmp_path / "images").iterdir())
    assert 2 <= len(files) < 9 and all(file.read_bytes() == image_bytes("red") for file in files)

    (tmp_path / "images" / "tiny-vm-106.png.1.part").write_bytes(b"left by a process that was killed")
    assert load_targets("tiny", folder=tmp_path)[6].image is None
    assert download_targets("tiny", tmp_path, base_url=base_url, **FAST).empty
    assert all(target.image for target in load_targets("tiny", folder=tmp_path)) and not leftovers(tmp_path)


@pytest.mark.slow
def test_a_killed_download_leaves_whole_files_only_and_resumes():
    from tools.scorecard import half_downloads

    lost, remark = half_downloads()
    assert lost == 0 and 8 <= int(remark.split()[2]) < 64


DYING_SERVER = """
import os, signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

body, sized = open(sys.argv[1], "rb").read(), sys.argv[2] == "sized"

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        if sized:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        os.kill(os.getpid(), signal.SIGKILL)

server = HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.mark.parametrize("length", ["sized", "of unknown length"])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_server_that_dies_within_an_image_leaves_no_half_file(web, publish, tmp_path, format, length, random_picture):
    buffer = io.BytesIO()
    random_picture(0, side=200).save(buffer, format)
    (tmp_path / "body").write_bytes(buffer.getvalue())
    command = [sys.executable, "-c", DYING_SERVER, tmp_path / "body", length]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        web.url, own = f"http://127.0.0.1:{server.stdout.readline().strip()}", web.url
        base_url = publish("/picture").replace(web.url, own)
        web.url = own
        dead = download_targets("tiny", tmp_path / "data", base_url=base_url, workers=1, **FAST)
        assert server.wait() == -signal.SIGKILL
    assert dead["reason"][0].startswith("ConnectionError" if length == "sized" else "not an image")
    assert not any((tmp_path / "data" / "images").iterdir()) and not leftovers(tmp_path / "data")


def test_ctrl_c_starts_no_further_images(web, publish, tmp_path, monkeypatch):
    stopped = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, **kwargs):
            super().shutdown(wait=False, **kwargs)
            stopped.set()
            super().shutdown(wait=wait)

    def interrupted(reasons, **kwargs):
        yield next(reasons)
        raise KeyboardInterrupt

    monkeypatch.setattr(prompt_lists, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(prompt_lists, "tqdm", interrupted)
    paths = [f"/{i}.png" for i in range(200)]
    web.pages |= {path: image_bytes("red") for path in paths}
    base_url, answer = publish(*paths), web._answer

    def slow(path):  # whatever comes after the first image, which brings the interruption, takes until then
        found = answer(path)
        if path in paths[1:]:
            stopped.wait(PATIENCE)
        return found

    web._answer = slow
    with pytest.raises(KeyboardInterrupt):
        download_targets("tiny", tmp_path, base_url=base_url, workers=2, **FAST)
    assert len(web.requests) <= 2 + 1 + 2 and not leftovers(tmp_path)  # lists, the first image, two under way


def test_images_are_fetched_in_parallel(web, publish, tmp_path):
    together = threading.Barrier(4, timeout=PATIENCE)  # opens only when four requests are under way
    paths = [f"/{i}.png" for i in range(4)]
    web.pages |= {path: image_bytes("red") for path in paths}
    base_url = publish(*paths)
    answer = web._answer

    def meeting(path):
        if path in paths:
            together.wait()
        return answer(path)

    web._answer = meeting
    assert download_targets("tiny", tmp_path, base_url=base_url, workers=4, **FAST).empty


def test_targets_that_were_never_downloaded_say_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"download_targets\('sd14', "):
        load_targets("sd14", folder=tmp_path)
    with pytest.raises(ValueError, match="needs folder="):
        load_targets("sd14")


def test_a_damaged_list_or_image_on_disk_is_named(web, publish, tmp_path):
    web.pages["/a.png"] = image_bytes("red")
    download_targets("tiny", tmp_path, base_url=publish("/a.png"), **FAST)
    image = tmp_path / "images" / "tiny-vm-100.png"
    image.write_bytes(image.read_bytes()[:40])
    with pytest.raises(OSError, match="Cannot read the picture of target tiny-vm-100 in .*tiny-vm-100.png .damaged"):
        load_targets("tiny", folder=tmp_path)
    (tmp_path / "memorized.csv").write_text("half a li")
    with pytest.raises(OSError, match="memorized.csv is not the published list.*Delete it"):
        load_targets("tiny", folder=tmp_path)


@pytest.mark.skipif(not NEMO.is_dir(), reason="needs the copies of NeMo's prompt lists")
def test_nemos_lists_have_112_vm_388_tm_and_500_controls(web, tmp_path):
    """Counts of Wen et al. (2024) as in the paper; 13 TM rows have no score."""
    for file in ("memorized_laion_prompts.csv", "unmemorized_laion_prompts.csv"):
        web.pages[f"/prompts/{file}"] = (NEMO / file).read_bytes()
    download_targets("sd14", tmp_path, base_url=f"{web.url}/prompts", images=False, **FAST)
    found = load_targets("sd14", folder=tmp_path)
    counts = {kind: sum(target.kind == kind for target in found) for kind in ("VM", "TM", "control")}
    assert counts == {"VM": 112, "TM": 388, "control": 500}
    assert len({target.id for target in found}) == len({target.prompt for target in found}) == 1000
    assert found[0].prompt == "The No Limits Business Woman Podcast" and found[0].kind == "VM"
    assert all(isinstance(target.prompt, str) and target.prompt for target in found)


@pytest.fixture
def testbed(tmp_path):
    table = pd.DataFrame(
        {
            "id": ["vm-0", "ladder-0", "control-0"],
            "prompt": ["a cat", "a dog", "grapes"],
            "list": ["A", "A", "C"],
            "kind": ["VM", "ladder", "control"],
            "seen_a": [900, 25, 0],
            "seen_b": [0, 0, 0],
            "image": [image_bytes(color, size=(64, 64)) for color in ("red", "green", "blue")],
        }
    )
    table.to_parquet(tmp_path / "targets.parquet")
    return tmp_path


@pytest.mark.parametrize("layout", ["metadata.csv", "metadata.jsonl", "txt"])
def test_a_folder_of_pictures_with_captions_is_targets(layout, tmp_path):
    captions = {"a.png": "a cat, red", "2.jpg": "a dog"}
    for name, color in zip(captions, ("red", "blue"), strict=True):
        Image.new("RGB", (40, 30), color).save(tmp_path / name)
        if layout == "txt":
            (tmp_path / name).with_suffix(".txt").write_text(f"{captions[name]}\n", encoding="utf-8-sig")  # Windows'
            (tmp_path / f"._{name}").write_bytes(b"written by a Mac")
    table = pd.DataFrame({"file_name": list(captions), "text": list(captions.values())})
    if layout == "metadata.csv":
        table.to_csv(tmp_path / layout, index=False)
    elif layout == "metadata.jsonl":
        table = table.assign(caption="another text, which text goes before")
        table.to_json(tmp_path / layout, orient="records", lines=True)
    found = {target.id: target for target in read_targets(tmp_path)}
    assert {id: target.prompt for id, target in found.items()} == {"a": "a cat, red", "2": "a dog"}
    assert found["a"].image.getpixel((0, 0)) == (255, 0, 0) and found["a"].kind == "target"


def test_a_folder_without_pictures_or_captions_says_so(tmp_path):
    with pytest.raises(OSError, match="no pictures in it.*Give a CSV"):
        read_targets(tmp_path)
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    with pytest.raises(OSError, match="no caption of a.png: neither metadata.csv nor a.txt"):
        read_targets(tmp_path)
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(ValueError, match="no prompt or no image in row 1"):
        read_targets(tmp_path)


# Tables: a text is the whole text, or there is an error that names the row


def write(path, table, **names):
    """A table, whose columns get other names, and the pictures that it names."""
    mark, header, rest = re.fullmatch("(\ufeff?)(.*?)(\r?\n.*)?", table, re.DOTALL).groups("")
    header = ",".join(names.get(column, column) for column in header.split(","))
    path.parent.mkdir(exist_ok=True)
    for picture in re.findall(r"\w\.png", table):
        Image.new("RGB", (20, 20)).save(path.parent / picture)
    path.write_text(mark + header + rest, encoding="utf-8", newline="")
    return path


def of_targets(table, folder):
    return [target.prompt for target in read_targets(write(folder / "own.csv", table))]


def of_metadata(table, folder):
    write(folder / "metadata.csv", table, image="file_name", prompt="text")
    return [target.prompt for target in read_targets(folder)]


def of_pairs(table, folder):
    return [caption for _, caption in read_pairs(write(folder / "pairs.csv", table, prompt="caption"))]


def of_paraphrases(table, folder):
    """The pictures' names stand in for prompts, and the prompts are their paraphrases."""
    path = write(folder / "mine" / "paraphrases.csv", table, image="prompt", prompt="paraphrase")
    materials = FolderMaterials("mine")
    materials.folder = path.parent
    pictures = dict.fromkeys(re.findall(r"\w\.png", table)) or ["a.png"]
    return [paraphrase for picture in pictures for paraphrase in materials.paraphrases(picture)]


READERS = pytest.mark.parametrize("read", [of_targets, of_metadata, of_pairs, of_paraphrases])


@READERS
@pytest.mark.parametrize("columns", ["prompt,image", "id,prompt,image", "image,prompt", "id,image,prompt,kind,,"])
@pytest.mark.parametrize("bad", [[0], [0, 1, 2], [1], [2]], ids=str)
def test_half_of_a_text_with_commas_is_never_taken_for_it(read, columns, bad, tmp_path):
    """Whether the surplus field is in one row or in all, and wherever pandas would look for an index."""
    for halves in (1, 2):
        for count in (max(bad) + 1, 3):
            texts = [f"cat {number}" + ", red" * halves * (number in bad) for number in range(count)]
            rows = [{"id": f"{n}", "prompt": text, "image": f"{'abc'[n]}.png"} for n, text in enumerate(texts)]
            lines = [",".join(row.get(column, "") for column in columns.split(",")) for row in rows]
            with pytest.raises((ValueError, OSError), match=f"row {bad[0] + 1} of .* fields .*red.*in double quotes"):
                read("\n".join([columns, *lines]), tmp_path)


@READERS
@pytest.mark.parametrize(
    ("table", "row"),
    [
        ("prompt,image\na cat,a.png\na dog", 2),
        ("id,prompt,image\n1,a cat,a.png\n2,b.png", 2),
        ("id,prompt,image\na cat,a.png", 1),
        ("image,prompt,source\na.png,a cat", 1),
        ("image,prompt,\na.png,a cat, red", 1),
    ],
)
def test_a_row_with_too_few_fields_or_some_under_no_name_is_named(read, table, row, tmp_path):
    with pytest.raises((ValueError, OSError), match=f"row {row} of .* fields"):
        read(table, tmp_path)


@READERS
@pytest.mark.parametrize("empty", ["", " ", '""', '" \n "', "\t", "\u3000"])
def test_a_text_without_a_word_is_missing(read, empty, tmp_path):
    with pytest.raises(ValueError, match="no .* in row 2"):
        read(f"image,prompt\na.png,a cat\nb.png,{empty}\nc.png,a dog", tmp_path)


@READERS
@pytest.mark.parametrize(
    "text",
    ["NA", "N/A", "nan", "null", "None", "-inf", "1.0", "007", "1e5", "True", "2024-01-01", "-", "#1 dad", "a cat "],
)
def test_every_word_is_a_text(read, text, tmp_path):
    assert read(f"image,prompt\na.png,{text}\nb.png,a dog", tmp_path) == [text, "a dog"]


@READERS
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("index", [False, True])
def test_what_is_quoted_is_whole(read, end, mark, index, tmp_path):
    texts = ["a cat, red", 'a "big" cat', "two\nlines", 'a 5" nail', "a dog", "a dog"]
    table = pd.DataFrame({"image": [f"{name}.png" for name in "abcdef"], "prompt": texts})
    table = table.to_csv(index=index, lineterminator=end)
    assert read(f"{mark}{table}{end}  {end}", tmp_path) == texts


@READERS
@pytest.mark.parametrize(
    ("table", "says"),
    [
        ('prompt,image\n"a cat,a.png\nb,b.png', "line"),
        ('prompt,image\n"a cat" and more,a.png', "line 2"),
        ("", "is empty|no column|its columns"),
    ],
)
def test_a_table_that_is_no_csv_says_where(read, table, says, tmp_path):
    with pytest.raises((ValueError, OSError), match=says):
        read(table, tmp_path)


def test_a_column_that_is_there_twice_is_named(tmp_path):
    with pytest.raises(OSError, match="a column twice: prompt, image, prompt"):
        of_targets("prompt,image,prompt\na cat,a.png,a dog", tmp_path)


def test_a_table_in_another_encoding_says_so(tmp_path):
    (tmp_path / "own.csv").write_bytes("prompt,image\nein Männchen,a.png".encode("cp1252"))
    with pytest.raises(OSError, match="utf-8"):
        read_targets(tmp_path / "own.csv")


def test_numbers_of_duplicates_are_numbers_and_a_word_is_an_error(tmp_path):
    write(tmp_path / "own.csv", "prompt,image,duplicates\na cat,a.png,25\na dog,b.png,\ngrapes,c.png,3.0")
    assert [target.duplicates for target in read_targets(tmp_path / "own.csv")] == [25, None, 3]
    write(tmp_path / "own.csv", "prompt,image,duplicates\na cat,a.png,many")
    with pytest.raises(OSError, match="many"):
        read_targets(tmp_path / "own.csv")


def test_captions_in_json_lines_are_texts_too(tmp_path):
    captions = ["NA", None, "null", 1.0, " "]
    for number in range(len(captions)):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{number}.png")

    def read(*numbers):
        lines = [json.dumps({"file_name": f"{number}.png", "text": captions[number]}) for number in numbers]
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
        return [target.prompt for target in read_targets(tmp_path)]

    for number in (1, 4):
        with pytest.raises(ValueError, match="no prompt or no image in row 2"):
            read(0, number, *({1, 2, 3, 4} - {number}))
        captions[number] = "a cat"
    assert read(0, 1, 2, 3, 4) == ["NA", "a cat", "null", "1.0", "a cat"]


def test_several_captions_in_one_line_are_not_one(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": ["a cat", "a red cat"]}))
    with pytest.raises(OSError, match="text in metadata.jsonl must be one text"):
        read_targets(tmp_path)


def test_a_table_without_rows_is_not_no_finding(tmp_path):
    with pytest.raises(ValueError, match="own.csv has no rows"):
        of_targets("prompt,image\n", tmp_path)


def test_two_targets_may_have_one_prompt(tmp_path):
    assert of_targets("prompt,image\na cat,a.png\na cat,b.png", tmp_path) == ["a cat", "a cat"]


def test_testbed_targets_have_images_and_duplicates(testbed):
    vm, ladder, control = load_targets("testbed", folder=testbed)
    assert (vm.id, vm.prompt, vm.kind, vm.duplicates) == ("vm-0", "a cat", "VM", 900)
    assert vm.image.size == (64, 64) and control.image.getpixel((5, 5)) == (0, 0, 255)
    assert ladder.duplicates == 25 and isinstance(ladder.duplicates, int) and control.duplicates == 0
    assert load_targets("testbed", kind="ladder", folder=testbed) == [ladder]
    assert len({vm, ladder, control}) == 3  # hashable: targets can be keys
    of_b = {target.id: (target.kind, target.duplicates) for target in load_targets("testbed-b", folder=testbed)}
    assert of_b == {"vm-0": ("twin", 0), "ladder-0": ("twin", 0), "control-0": ("control", 0)}


def test_an_unknown_duplication_count_is_none(testbed):
    table = pd.read_parquet(testbed / "targets.parquet")
    table.assign(seen_a=[900, None, 0]).to_parquet(testbed / "targets.parquet")
    assert [target.duplicates for target in load_targets("testbed", folder=testbed)] == [900, None, 0]


def test_the_testbed_is_read_from_the_bundled_model(testbed, monkeypatch):
    monkeypatch.setattr(targets, "TESTBED", testbed)
    assert len(load_targets()) == 3


def test_unknown_names_and_kinds_list_the_known_ones(testbed):
    with pytest.raises(ValueError, match="Unknown targets 'sd99'. Known: testbed, testbed-b, sd14"):
        load_targets("sd99")
    with pytest.raises(ValueError, match="no targets of kind 'vm'; its kinds: VM, control, ladder"):
        load_targets("testbed", kind="vm", folder=testbed)
    with pytest.raises(ValueError, match="Unknown targets 'testbed'. Known: sd14"):
        download_targets("testbed", testbed)


def test_a_missing_or_damaged_table_is_named(testbed, tmp_path):
    table = testbed / "targets.parquet"
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(OSError, match="Cannot read .*targets.parquet"):
        load_targets("testbed", folder=testbed)
    table.unlink()
    with pytest.raises(FileNotFoundError, match="No .*targets.parquet.*tools.training"):
        load_targets("testbed", folder=testbed)


def test_a_damaged_image_in_the_table_names_its_target(testbed):
    table = pd.read_parquet(testbed / "targets.parquet")
    table.at[1, "image"] = table.at[1, "image"][:50]
    table.to_parquet(testbed / "targets.parquet")
    with pytest.raises(OSError, match="Cannot read the picture of target ladder-0 in targets.parquet .*truncated"):
        load_targets("testbed", folder=testbed)
