"""Entries come from the archive once, whole and checked; what goes wrong is one sentence."""

import gzip
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from maps import blob, write

from datamodules.emdb_download import download

XML = (
    '<emd><map><contour_list><contour primary="true"><level>0.05</level></contour></contour_list></map>'
    '<resolution units="Å" res_type="BY AUTHOR">3.2</resolution></emd>'
)


class Archive:
    """EMDB in this process: `files` by path, what was asked for, and how many bytes an answer has at most."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.most: int | None = None
        archive = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name, wanted = self.path.lstrip("/"), self.headers.get("Range")
                archive.asked.append((name, wanted))
                content = archive.files.get(name)
                if content is None:
                    self.send_error(404)
                    return
                begin = int(re.search(r"\d+", wanted)[0]) if wanted else 0
                if begin >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206 if wanted else 200)
                self.send_header("Content-Length", str(len(content) - begin))
                self.end_headers()
                self.wfile.write(content[begin : None if archive.most is None else begin + archive.most])

            def log_message(self, *_) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def archive(tmp_path):
    served = Archive()
    content = gzip.compress(write(tmp_path / "m.mrc", blob((12, 12, 12)), 3.0).read_bytes())
    for name in ("map/emd_1234.map.gz", "other/emd_1234_half_map_1.map.gz", "other/emd_1234_half_map_2.map.gz"):
        served.files[f"EMD-1234/{name}"] = content
    served.files["EMD-1234/header/emd-1234.xml"] = XML.encode()
    yield served
    served.server.shutdown()
    served.server.server_close()


def test_an_entry_is_downloaded_once_with_what_its_header_says(archive, tmp_path):
    (entry,) = download(["EMD-1234"], tmp_path / "d", True, archive.address)
    assert (entry.id, entry.resolution, entry.contour, entry.listed) == ("EMD-1234", 3.2, 0.05, True)
    assert [file.name for file in entry.files] == [
        "emd_1234.map.gz", "emd_1234_half_map_1.map.gz", "emd_1234_half_map_2.map.gz",
    ]  # fmt: skip
    assert entry.map.read_bytes() == archive.files["EMD-1234/map/emd_1234.map.gz"]
    asked = len(archive.asked)
    assert asked == 4
    assert download([1234], tmp_path / "d", True, archive.address) == [entry]
    assert len(archive.asked) == asked
    assert not list((tmp_path / "d").rglob("*.part"))


def test_a_file_that_changed_on_the_disk_is_downloaded_again(archive, tmp_path, caplog):
    (entry,) = download([1234], tmp_path / "d", False, archive.address)
    entry.map.write_bytes(b"damaged")
    download([1234], tmp_path / "d", False, archive.address)
    assert entry.map.read_bytes() == archive.files["EMD-1234/map/emd_1234.map.gz"]
    assert "is not what was downloaded" in caplog.text


def test_a_download_that_broke_off_goes_on_where_it_stopped(archive, tmp_path):
    archive.most = 300
    with pytest.raises(ValueError, match=r"emd_1234\.map\.gz cannot be reached .* or try again"):
        download([1234], tmp_path / "d", False, archive.address)
    assert not (tmp_path / "d/EMD-1234/map/emd_1234.map.gz").exists()
    archive.most = None
    (entry,) = download([1234], tmp_path / "d", False, archive.address)
    assert archive.asked[1] == ("EMD-1234/map/emd_1234.map.gz", "bytes=300-")
    assert entry.map.read_bytes() == archive.files["EMD-1234/map/emd_1234.map.gz"]


def test_what_arrives_damaged_is_not_kept(archive, tmp_path):
    name = "EMD-1234/map/emd_1234.map.gz"
    archive.files[name] = archive.files[name][:200] + b"\0\0\0\0" + archive.files[name][204:]
    with pytest.raises(ValueError, match="arrived damaged"):
        download([1234], tmp_path / "d", False, archive.address)
    assert not list((tmp_path / "d").rglob("*.gz*"))


def test_an_unknown_entry_and_a_silent_archive_are_said(archive, tmp_path):
    with pytest.raises(ValueError, match=r"EMD-9999/map/emd_9999\.map\.gz is not there: correct data\.accessions"):
        download([9999], tmp_path / "d", False, archive.address)
    with pytest.raises(ValueError, match=r"cannot be reached \(.*\): give files as data\.path"):
        download([1234], tmp_path / "d", False, "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="four or five digits"):
        download(["EMPIAR-10"], tmp_path / "d", False, archive.address)
