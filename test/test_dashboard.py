"""The dashboard: over HTTP and WebSocket, and where the line matters with the node over DDS."""

import asyncio
import base64
import contextlib
import http.client
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np
import psutil
import pytest
import yaml

pytest.importorskip("aiohttp", reason="needs aiohttp: pip install aiohttp")
pytest.importorskip("rclpy", reason="needs ROS 2 (source its setup file, or use ./sorter test)")

import aiohttp
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import Point32
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from waste_seg_ros.dashboard import server as web
from waste_seg_ros.dashboard.server import Answer, Picture, Server, ServerError
from waste_seg_ros.dashboard.state import LineState, Seen
from waste_seg_ros.msg import ArmState, Pick, WasteItem, WasteItemArray
from waste_seg_ros.nodes.dashboard import serialized_stamp
from waste_seg_ros.nodes.images import to_image

WIDTH, HEIGHT = 160, 120
TOKEN = "a-token-of-enough-characters"


# --- browsers ---------------------------------------------------------------------------------


def ask(url, method="GET", path="/", body=None, **headers):
    """Send a request just as it is; returns status, headers and text."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        content = body.encode() if isinstance(body, str) else body
        if content is not None:
            connection.putheader("Content-Length", str(len(content)))
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(content)
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read().decode()
    finally:
        connection.close()


def post(url, path, value, **headers):
    """As the page does."""
    headers = {"Origin": url.rstrip("/"), "Content_Type": "application/json", **headers}
    return ask(url, "POST", path, json.dumps(value), **headers)


class Onlooker:
    """A browser's WebSocket, in a thread of its own.

    `answers`: it says that it has drawn what came.
    """

    def __init__(self, url, answers=True, **headers):
        self.states, self.pictures = [], []
        self.closed = None
        self.refused = None
        self._answers = answers
        parts = urlsplit(url)
        self._url = f"ws://{parts.netloc}/live"
        self._headers = {"Origin": f"http://{parts.netloc}", **headers}
        self._loop = asyncio.new_event_loop()
        self._task = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        self._task = self._loop.create_task(self._look())
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
        self._loop.close()

    async def _look(self):
        async with aiohttp.ClientSession() as session:
            try:
                ws = await session.ws_connect(self._url, headers=self._headers, max_msg_size=0)
            except aiohttp.WSServerHandshakeError as error:
                self.refused = error.status
                return
            async for message in ws:
                if message.type == aiohttp.WSMsgType.TEXT:
                    header = json.loads(message.data)
                    self.states.append(header)
                else:
                    (length,) = np.frombuffer(message.data[:4], "<u4")
                    header = json.loads(message.data[4 : 4 + length])
                    self.pictures.append((header, message.data[4 + length :]))
                if self._answers:
                    await ws.send_json({"got": header["n"]})
            self.closed = ws.close_code

    def state(self):
        return self.states[-1] if self.states else None

    def close(self):
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)


@pytest.fixture
def onlooker():
    """A function that opens a WebSocket to a dashboard."""
    opened = []

    def look(url, **options):
        opened.append(Onlooker(url, **options))
        return opened[-1]

    yield look
    for one in opened:
        one.close()


def wait_for(condition, timeout=20.0):
    end = time.monotonic() + timeout
    while not (found := condition()):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return found


# --- the state, without a server ----------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def item(number=1, kind="paper", score=0.9, **fields):
    return Seen(number, kind, score, (10.0, -20.0), 30.0, (200.0, 100.0, 0.0), **fields)


def test_rate_and_latency_are_of_the_last_seconds(clock):
    state = LineState(clock=clock)
    for k in range(101):
        state.add_items([item()], latency=0.001 * k)
        clock.now += 0.1
    shown = state.snapshot()
    assert shown["rate"] == pytest.approx(10.0, abs=0.2)
    assert shown["p50"] == pytest.approx(51, abs=2) and shown["p99"] == pytest.approx(99, abs=2)
    state.tick()
    assert state.history() == [[1, shown["rate"], shown["p50"], shown["p99"], 1]]
    clock.now += 5
    assert state.snapshot()["rate"] == pytest.approx(5.0, abs=0.3), "half the time nothing came"
    clock.now += 6
    shown = state.snapshot()
    assert (shown["rate"], shown["p50"], shown["inView"], shown["items"]) == (0, None, None, [])
    state.tick()
    assert state.history(after=1) == [[2, 0.0, None, None, None]]
    assert state.history(after=2) == []


def test_history_has_an_end(clock):
    state = LineState(clock=clock)
    for _ in range(700):
        state.tick()
        clock.now += 1
    assert len(state.history()) == 600
    assert [point[0] for point in state.history(after=697)] == [698, 699, 700]


def test_drops_are_counted_over_a_minute_and_from_a_fresh_start(clock):
    state = LineState(clock=clock)

    def report(dropped):
        state.add_health(
            "segmenter: camera", "ok", "", {"dropped": str(dropped), "lost on the way": "2"}
        )
        state.tick()
        clock.now += 1

    for k in range(120):
        report(10 * k)
    shown = state.snapshot()["dropped"]
    assert shown["total"] == 1192 and shown["parts"]["lost on the way"] == 2
    assert shown["minute"] == pytest.approx(600, abs=20)
    report(0)  # started anew
    assert state.snapshot()["dropped"] == {
        **shown,
        "total": 2,
        "minute": 0,
        "parts": {**shown["parts"], "dropped": 0},
    }


def test_silence_and_what_is_wrong_are_said_with_the_mend(clock):
    state = LineState(domain="17", clock=clock)
    assert state.snapshot()["summary"]["text"] == "Listening"
    clock.now += 10
    summary = state.snapshot()["summary"]
    assert summary["level"] == "silent" and "10 s" in summary["text"]
    assert "domain 17" in summary["mend"] and "waste-seg up" in summary["mend"]

    state.add_health("segmenter: camera", "warn", "no K: calibrate", {})
    summary = state.snapshot()["summary"]
    assert summary["level"] == "error" and "No items" in summary["text"]
    state.add_items([item()], 0.05)
    assert state.snapshot()["summary"] == {
        "level": "warn",
        "text": "segmenter: camera",
        "mend": "no K: calibrate",
    }
    state.add_health("segmenter: model", "error", "it broke: mend it", {})
    assert state.snapshot()["summary"]["mend"] == "it broke: mend it"
    state.add_health("segmenter: model", "ok", "", {})
    state.add_health("segmenter: camera", "ok", "", {})
    assert state.snapshot()["summary"]["level"] == "ok"

    for _ in range(8):  # the node is gone, the camera's is not
        clock.now += 1
        state.add_health("camera: source", "ok", "", {})
    gone = state.snapshot()
    assert gone["summary"]["level"] == "error"
    said = {d["name"]: d["message"] for d in gone["diagnostics"]}
    assert "has said nothing for 8 s" in said["segmenter: model"]
    clock.now += 700
    assert state.snapshot()["diagnostics"] == [], "what is gone for good is not spoken of"


def test_arms_and_their_purity(clock):
    state = LineState(clock=clock)
    state.add_arm("left", ready=True, picked=3, missed=1)
    state.add_order("left", 7, "paper", 0.8, 12.5)
    state.add_order("left", 7, "paper", 0.8, 12.5)  # heard again
    state.add_order("left", 8, "bottle", 0.6, 13.5)
    state.add_order("right", 9, "nylon", 0.5, 14.0)
    left, right = state.snapshot()["arms"]
    assert (left["name"], left["state"], left["picked"], left["missed"]) == ("left", "ready", 3, 1)
    assert left["ordered"] == 2 and left["expected"] == 0.7 and left["purity"] is None
    assert right["state"] == "unknown" and right["kinds"] == {"nylon": 1}
    clock.now += 1.5
    assert state.snapshot()["arms"][0]["state"] == "dead"
    counts = {"arm": "left", "right paper": "5", "right bottle": "4", "wrong paper": "1"}
    state.add_health("sim_left: picks", "ok", "", {**counts, "missed paper": "2"})
    assert state.snapshot()["arms"][0] == {
        **left,
        "state": "dead",
        "right": 9,
        "wrong": 1,
        "purity": 0.9,
    }


def test_tracks_are_counted_once_each_and_those_that_come_next_are_first(clock):
    state = LineState(clock=clock)
    state.add_items([item(1), item(2)], 0.05)
    for _ in range(3):
        tracks = [item(4, pick_s=-1.0), item(5, "nylon", pick_s=3.0), item(6, pick_s=0.5)]
        state.add_tracks(tracks)
    shown = state.snapshot()
    assert [row["id"] for row in shown["items"]] == [6, 5, 4]
    assert (shown["inView"], shown["tracked"]) == (2, 3)
    totals = {c["name"]: (c["now"], c["total"]) for c in shown["classes"]}
    assert totals == {"paper": (2, 2), "nylon": (0, 1)}


def test_shares_of_classes_are_of_the_last_minute(clock):
    state = LineState(clock=clock)
    state.add_items([item(kind="paper")] * 3, 0.05)
    clock.now += 40
    state.add_items([item(kind="bottle")], 0.05)
    shares = {c["name"]: (c["now"], c["share"]) for c in state.snapshot()["classes"]}
    assert shares == {"paper": (0, 0.75), "bottle": (1, 0.25)}
    clock.now += 30
    shares = {c["name"]: (c["now"], c["share"]) for c in state.snapshot()["classes"]}
    assert shares == {"paper": (0, 0.0), "bottle": (0, 1.0)}
    clock.now += 60
    assert all(c["share"] == 0 for c in state.snapshot()["classes"])


def test_numbers_that_are_none_are_no_trouble(clock):
    state = LineState(clock=clock)
    bad = Seen(1, "paper", math.nan, (math.inf, 0.0), math.nan, (math.nan, 1.0, 0.0))
    state.add_items([bad], math.nan, stages={"transport": math.nan})
    text = json.dumps([state.snapshot(), bad.drawing()], allow_nan=False)
    assert "null" in text


# --- the server, without a line -----------------------------------------------------------------


class Toy:
    """A line whose pictures are as large as wanted."""

    def __init__(self):
        self.state = LineState()
        self.asked = []
        self.viewers = 0
        self.payload = b"jpeg"
        self.release = None

    def picture(self):
        return Picture((time.monotonic_ns(),), lambda: ({"items": []}, self.payload))

    def models(self):
        return [{"name": "enet-instance"}, {"name": "enet-binary"}]

    def _answer(self, *asked):
        self.asked.append(asked)
        future = Future()
        if self.release is None:
            future.set_result(Answer(True, "", asked[0]))
        else:
            self.release.append(future)
        return future

    def select_model(self, name, backend):
        return self._answer(name, backend)

    def roll_back(self):
        return self._answer("back")

    def watched(self, viewers):
        self.viewers = viewers


@pytest.fixture
def serve():
    """A function that serves a `Toy`; returns both."""
    running = []

    def start(host="127.0.0.1", **options):
        toy = Toy()
        running.append(Server(toy, host, 0, **options))
        return toy, running[-1]

    yield start
    for one in running:
        assert one.stop()


def test_only_the_page_itself_is_served_and_may_do_little(serve):
    _, server = serve()
    for path, kind in (
        ("/", "text/html"),
        ("/app.js", "text/javascript"),
        ("/style.css", "text/css"),
        ("/icon.svg", "image/svg+xml"),
    ):
        status, headers, text = ask(server.url, path=path)
        assert status == 200 and headers.get_content_type() == kind and text
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "aiohttp" not in headers["Server"]
    html = ask(server.url)[2]
    assert not re.search(r"https?://|<script(?! src=\"/)|\son\w+=|style=", html), "all is from here"
    assert "innerHTML" not in ask(server.url, path="/app.js")[2]


@pytest.mark.parametrize(
    "path",
    [
        "/../server.py",
        "/static/../../server.py",
        "/..%2fserver.py",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/app.js/../../__init__.py",
        "/index.html",
        "/server.py",
    ],
)
def test_nothing_else_can_be_read(serve, path):
    _, server = serve()
    status, _, text = ask(server.url, path=path)
    assert status in (400, 404), text
    assert "import" not in text and "root:" not in text


def test_a_name_that_was_made_to_lead_here_is_refused(serve):
    _, server = serve()
    assert ask(server.url, Host=f"localhost:{server.port}")[0] == 200
    for host in (f"evil.example:{server.port}", "evil.example", "127.0.0.1.evil.example"):
        assert ask(server.url, Host=host)[0] == 403
    assert ask(server.url, Host="a b; script-src *")[0] == 400


def test_another_pages_websocket_and_changes_are_refused(serve, onlooker):
    toy, server = serve()
    for origin in ("http://evil.example", "null", "", f"http://127.0.0.1:{server.port + 1}"):
        stranger = onlooker(server.url, Origin=origin)
        assert wait_for(lambda stranger=stranger: stranger.refused) == 403, origin
        status, _, _ = post(server.url, "/api/model", {"model": "enet-binary"}, Origin=origin)
        assert status == 403
    assert ask(server.url, "POST", "/api/rollback", "{}", Content_Type="application/json")[0] == 403
    assert toy.asked == []


def test_what_a_change_takes_and_what_not(serve):
    toy, server = serve()
    status, _, text = post(server.url, "/api/model", {"model": "enet-binary", "backend": "torch"})
    assert status == 200
    assert json.loads(text) == {"success": True, "message": "", "model": "enet-binary"}
    assert post(server.url, "/api/rollback", {})[0] == 200
    assert toy.asked == [("enet-binary", "torch"), ("back",)]
    for value, expected in (
        ({"model": "/etc/passwd"}, 404),
        ({"model": "../bundles/enet-binary"}, 404),
        ({"model": ["enet-binary"]}, 400),
        ({}, 400),
        ([], 400),
    ):
        assert post(server.url, "/api/model", value)[0] == expected
    origin = server.url.rstrip("/")
    plain = ask(server.url, "POST", "/api/rollback", "{}", Origin=origin, Content_Type="text/plain")
    assert plain[0] == 415, "what a form can send without being asked"
    assert post(server.url, "/api/model", {"model": "x" * 5000})[0] == 413
    assert len(toy.asked) == 2


def test_changes_come_one_at_a_time_and_not_too_often(serve):
    toy, server = serve()
    toy.release = []
    results = []

    def change():
        results.append(post(server.url, "/api/rollback", {})[0])

    first = threading.Thread(target=change)
    first.start()
    assert wait_for(lambda: toy.release)
    change()
    assert results == [409]
    toy.release[0].set_result(Answer(False, "it has no way back", "enet-binary"))
    first.join(10)
    assert results == [409, 200]
    toy.release = None
    while len(results) < 40 and results[-1] != 429:
        change()
    assert results[-1] == 429 and len(results) >= 10
    asked = len(toy.asked)
    change()
    assert len(toy.asked) == asked


def test_with_a_token_nothing_is_seen_without_it(serve, onlooker):
    _, server = serve(token=TOKEN)
    assert server.url.endswith(f"/?token={TOKEN}")
    base = server.url.partition("?")[0]
    for path in ("/", "/app.js", "/api/models", "/live", "/?token=wrong", "/nothing"):
        status, _, text = ask(base, path=path)
        assert status == 401, path
        assert TOKEN not in text
    assert post(base, "/api/rollback", {})[0] == 401
    stranger = onlooker(base)
    assert wait_for(lambda: stranger.refused) == 401

    status, headers, _ = ask(base, path=f"/?token={TOKEN}")
    assert status == 303 and headers["Location"] == "/"
    cookie = headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and TOKEN not in cookie
    cookie = cookie.partition(";")[0]
    assert ask(base, Cookie=cookie)[0] == 200
    assert ask(base, Cookie=cookie[:-1] + "é")[0] in (400, 401)
    assert ask(base, path="/api/models", Authorization=f"Bearer {TOKEN}")[0] == 200
    assert post(base, "/api/rollback", {}, Cookie=cookie)[0] == 200
    friend = onlooker(base, Cookie=cookie)
    assert wait_for(lambda: friend.states and friend.pictures)
    # Another page cannot use the cookie, should a browser send it.
    thief = onlooker(base, Cookie=cookie, Origin="http://evil.example")
    assert wait_for(lambda: thief.refused) == 403


def test_tokens_cannot_be_tried_out(serve):
    _, server = serve(token=TOKEN)
    base = server.url.partition("?")[0]
    cookie = ask(base, path=f"/?token={TOKEN}")[1]["Set-Cookie"].partition(";")[0]
    results = [ask(base, path=f"/?token=guess{k}")[0] for k in range(14)]
    assert results[0] == 401 and results[-1] == 429
    assert ask(base, path=f"/?token={TOKEN}")[0] == 429, "nor is the right one told from others"
    assert ask(base, Cookie=cookie)[0] == 200, "who is in stays in"


def test_a_token_is_made_for_an_address_that_others_reach(serve):
    assert web.is_loopback("127.0.0.1") and web.is_loopback("::1") and web.is_loopback("localhost")
    assert not web.is_loopback("0.0.0.0") and not web.is_loopback("::")
    assert not web.is_loopback("example.org")
    _, server = serve(host="0.0.0.0")
    assert len(server.door.token) >= 32
    assert server.door.token in server.url and "0.0.0.0" not in server.url
    assert ask(f"http://127.0.0.1:{server.port}/")[0] == 401
    with pytest.raises(ServerError, match="at least 16"):
        web.Door("0.0.0.0", "short")


def test_a_port_that_is_taken_is_named(serve):
    _, server = serve()
    with pytest.raises(ServerError, match=rf"127\.0\.0\.1 port {server.port}: .*in use"):
        Server(Toy(), "127.0.0.1", server.port)


def test_nonsense_on_the_websocket_ends_it(serve, onlooker):
    _, server = serve()

    async def say(text):
        headers = {"Origin": server.url.rstrip("/")}
        async with aiohttp.ClientSession() as session:
            address = f"ws://127.0.0.1:{server.port}/live"
            async with session.ws_connect(address, headers=headers) as ws:
                await ws.send_str(text)
                async for _ in ws:
                    pass
                return ws.close_code

    for text in ("no json", "[1]", "[" * 3000, "x" * 5000):
        assert asyncio.run(asyncio.wait_for(say(text), 20)) in (1008, 1009), text[:10]


def test_pictures_are_made_only_for_those_who_see_them(serve, onlooker):
    toy, server = serve()
    assert wait_for(lambda: toy.viewers == 0)
    one = onlooker(server.url)
    assert wait_for(lambda: one.pictures and toy.viewers == 1)
    one.close()
    assert wait_for(lambda: toy.viewers == 0)


def test_who_does_not_draw_gets_no_more_and_is_let_go(serve, onlooker, monkeypatch):
    monkeypatch.setattr(web, "PATIENCE", 3.0)
    toy, server = serve(rate=50)
    toy.payload = bytes(1 << 20)
    slow = onlooker(server.url, answers=False)
    quick = onlooker(server.url)
    assert wait_for(lambda: slow.closed), "let go"
    assert slow.closed == 1013
    assert len(slow.states) + len(slow.pictures) == web.AHEAD
    assert len(quick.pictures) > 5 and quick.closed is None
    numbers = [header["n"] for header, _ in quick.pictures]
    assert numbers == sorted(set(numbers))


# --- the node over DDS --------------------------------------------------------------------------


@pytest.fixture
def dashboard(start_node):
    """A function that starts the node; returns its process and address."""

    def start(**parameters):
        node = start_node("dashboard", {"port": 0, **parameters})
        address = re.compile(r"^dashboard: (http://\S+)$", re.MULTILINE)
        found = wait_for(lambda: address.search(node.output()) or not node.alive(), 60)
        assert found not in (True, False), node.output()
        return node, found.group(1)

    return start


class Talk:
    """What a segmenter and a camera say, at the test's own pace."""

    def __init__(self, ros, size=(WIDTH, HEIGHT), compressed=False):
        self.ros = ros
        kind = CompressedImage if compressed else Image
        topic = "image_raw/compressed" if compressed else "image_raw"
        self._images = ros.node.create_publisher(kind, topic, 10)
        self._infos = ros.node.create_publisher(CameraInfo, "camera_info", 10)
        self._items = ros.node.create_publisher(WasteItemArray, "items", 10)
        self._diagnostics = ros.node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._compressed = compressed
        self._pixels = np.zeros((size[1], size[0], 3), np.uint8)
        self._pixels[: size[1] // 2] = (200, 0, 0)
        self.quiet = False

    def header(self):
        image = Image()
        image.header.stamp = self.ros.node.get_clock().now().to_msg()
        image.header.frame_id = "camera"
        return image.header

    def say(self):
        """One image, its items, and diagnostics."""
        header = self.header()
        height, width = self._pixels.shape[:2]
        info = CameraInfo(header=header, width=width, height=height)
        info.k = [100.0, 0.0, 79.5, 0.0, 100.0, 59.5, 0.0, 0.0, 1.0]
        self._infos.publish(info)
        if self._compressed:
            jpeg = cv2.imencode(".jpg", self._pixels[..., ::-1])[1].tobytes()
            self._images.publish(CompressedImage(header=header, format="rgb8; jpeg", data=jpeg))
        else:
            self._images.publish(to_image(self._pixels, "rgb8", header))
        self.ros.spin_until(lambda: False, 0.02)
        if self.quiet:
            return
        self._items.publish(
            WasteItemArray(header=header, model="colours", items=[self.item(header)])
        )
        status = DiagnosticStatus(
            name="segmenter: model",
            level=DiagnosticStatus.WARN,
            message="it runs on one leg: give it another",
            values=[
                KeyValue(key="bundle", value="/some/where/colours"),
                KeyValue(key="classes", value="paper, bottle"),
            ],
        )
        self._diagnostics.publish(DiagnosticArray(status=[status]))

    def item(self, header):
        thing = WasteItem(header=header, track_id=3, class_id="bottle", score=0.75, pickable=True)
        thing.length, thing.width, thing.grasp_width = 0.2, 0.1, 0.1
        place = thing.pose.pose
        place.position.x, place.position.y, place.position.z = 0.1, -0.05, 1.0
        # The jaws close along y of the grasp, here along the image's rows.
        thing.grasp.position.x, thing.grasp.position.y, thing.grasp.position.z = 0.1, -0.05, 1.0
        thing.grasp.orientation.z = math.sin(-math.pi / 4)
        thing.grasp.orientation.w = math.cos(math.pi / 4)
        corners = ((80, 50), (100, 50), (100, 60), (80, 60))
        thing.outline.points = [Point32(x=float(x), y=float(y)) for x, y in corners]
        roi = thing.roi
        roi.x_offset, roi.y_offset, roi.width, roi.height = 80, 50, 20, 10
        return thing

    def until(self, condition, timeout=60.0):
        """Talk on until it holds."""
        end = time.monotonic() + timeout
        while not (found := condition()):
            if time.monotonic() > end:
                return False
            self.say()
            self.ros.spin_until(lambda: False, 0.05)
        return found


@pytest.mark.parametrize("transport", ["raw", "compressed"])
def test_what_the_line_says_reaches_the_browser(ros, dashboard, onlooker, transport):
    node, url = dashboard(image_transport=transport)
    talk = Talk(ros, compressed=transport == "compressed")
    browser = onlooker(url)

    def seen_whole():
        whole = [
            p for p in browser.pictures if p[0]["items"] and p[1] and p[0]["items"][0]["grasp"]
        ]
        state = browser.state()
        return whole and state and state["items"] and state["diagnostics"] and whole[-1]

    found = talk.until(seen_whole)
    assert found, node.output()
    header, jpeg = found
    assert (header["width"], header["height"]) == (WIDTH, HEIGHT)
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(image[10, 10].astype(int) - (200, 0, 0)).max() < 12
    (drawn,) = header["items"]
    assert drawn["outline"] == [80, 50, 100, 50, 100, 60, 80, 60]
    # 0.1 m at 100 px a metre about (79.5 + 10, 59.5 - 5), along the rows.
    assert sorted((drawn["grasp"][0], drawn["grasp"][2])) == pytest.approx([84.5, 94.5], abs=0.11)
    assert drawn["grasp"][1::2] == pytest.approx([54.5, 54.5], abs=0.11)
    assert header["colors"] == {"paper": "#e69f00", "bottle": "#0072b2"}

    state = browser.state()
    assert state["model"]["name"] == "colours"
    (row,) = state["items"]
    assert (row["id"], row["kind"], row["score"], row["place"]) == (3, "bottle", 0.75, [100, -50])
    assert row["size"][:2] == [200, 100] and row["reason"] == ""
    assert state["summary"]["level"] == "warn" and "give it another" in state["summary"]["mend"]
    assert state["images"] > 0 and state["p50"] is not None
    assert [c["name"] for c in state["classes"]] == ["paper", "bottle"]
    assert talk.until(lambda: any(s["points"] for s in browser.states))

    talk.quiet = True  # the segmenter goes
    assert talk.until(lambda: browser.pictures[-1][0]["bare"] and browser.pictures[-1][1])
    assert node.stop() == 0
    assert wait_for(lambda: browser.closed) == 1001
    assert "Traceback" not in node.output()


def test_tracks_orders_and_arms_are_shown(ros, dashboard, onlooker):
    _, url = dashboard()
    talk = Talk(ros)
    tracks = ros.node.create_publisher(WasteItemArray, "tracks", 10)
    states = ros.node.create_publisher(ArmState, "arms/state", 10)
    lasting = QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    picks = ros.node.create_publisher(Pick, "picks", lasting)
    header = talk.header()
    order = Pick(header=header, track_id=41, arm="arm_1", item=talk.item(header))
    order.pick_time.sec = header.stamp.sec + 100
    picks.publish(order)
    browser = onlooker(url)

    def shown():
        header = talk.header()
        track = talk.item(header)
        track.track_id = 41
        track.pick_time.sec = header.stamp.sec + 100
        track.pick_time.nanosec = header.stamp.nanosec
        tracks.publish(WasteItemArray(header=header, items=[track]))
        states.publish(ArmState(header=header, arm="arm_1", ready=True, picked=2, missed=1))
        state = browser.state()
        numbers = [i["id"] for h, _ in browser.pictures[-1:] for i in h["items"]]
        return state and state["arms"] and state["tracked"] and numbers == [41] and state

    state = talk.until(shown)
    assert state
    (arm,) = state["arms"]
    assert (arm["name"], arm["picked"], arm["missed"], arm["ordered"]) == ("arm_1", 2, 1, 1)
    assert arm["expected"] == 0.75
    assert state["items"][0]["id"] == 41 and 80 < state["items"][0]["pick"] <= 100
    assert {c["name"]: c["total"] for c in state["classes"]}["bottle"] == 1


def test_a_silent_graph_is_called_that(dashboard, onlooker):
    _, url = dashboard()
    browser = onlooker(url)
    assert wait_for(lambda: browser.state() and "silent" in browser.state()["summary"]["text"], 30)
    assert f"domain {os.environ['ROS_DOMAIN_ID']}" in browser.state()["summary"]["mend"]
    assert browser.pictures == []


def test_models_are_changed_and_taken_back(ros, start_node, dashboard, colour_bundles, onlooker):
    parameters = {"model": "colours", "bundles_dir": colour_bundles, "backend": "onnxruntime"}
    segmenter = start_node("segmenter", parameters)
    node, url = dashboard(bundles_dir=str(colour_bundles))
    status, _, text = ask(url, path="/api/models")
    models = {model["name"]: model for model in json.loads(text)["models"]}
    assert status == 200 and {"colours", "shifted", "damaged"} <= models.keys()
    assert models["shifted"]["head"] == "semantic" and not models["shifted"]["problem"]

    browser = onlooker(url)
    images = ros.node.create_publisher(Image, "image_raw", 10)
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[40:80, 40:100] = (200, 0, 0)

    def kind_is(model, kind):
        def seen():
            header = Image().header
            header.stamp = ros.node.get_clock().now().to_msg()
            images.publish(to_image(pixels, "rgb8", header))
            ros.spin_until(lambda: False, 0.1)
            state = browser.state()
            return (
                state
                and state["model"]["name"] == model
                and any(row["kind"] == kind for row in state["items"])
            )

        return wait_for(seen, 90)

    def change(path, value):
        status, _, text = post(url, path, value)
        assert status == 200, text
        return json.loads(text)

    assert kind_is("colours", "paper"), segmenter.output() + node.output()
    # The way back is known only when the segmenter has said what is at work.
    assert wait_for(lambda: browser.state()["model"]["backend"], 20)
    assert change("/api/rollback", {})["success"] is False
    assert change("/api/model", {"model": "shifted"}) == {
        "success": True,
        "message": "",
        "model": "shifted",
    }
    assert kind_is("shifted", "bottle"), "red is called bottle by this one"
    assert browser.state()["model"]["previous"] == "colours"
    refused = change("/api/model", {"model": "damaged"})
    assert refused["success"] is False and "damaged" in refused["message"]
    assert refused["model"] == "shifted"
    assert change("/api/rollback", {})["model"] == "colours"
    assert kind_is("colours", "paper")
    assert browser.state()["model"]["previous"] == ""


def test_a_node_that_keeps_models_is_asked_for_the_way_back(ros, dashboard, onlooker):
    from waste_seg_ros.srv import RollBackModel

    def answer(request, response):
        response.success, response.active_model = True, "enet-before"
        return response

    ros.node.create_service(RollBackModel, "trainer/roll_back", answer)
    _, url = dashboard()
    browser = onlooker(url)
    assert ros.spin_until(lambda: browser.state() and browser.state()["model"]["kept"], 30)
    ros.spin_until(lambda: False, 0.5)
    results = []
    thread = threading.Thread(target=lambda: results.append(post(url, "/api/rollback", {})))
    thread.start()
    assert ros.spin_until(lambda: results, 30)
    assert json.loads(results[0][2]) == {"success": True, "message": "", "model": "enet-before"}


def test_nobody_serves_a_change(dashboard):
    _, url = dashboard()
    name = json.loads(ask(url, path="/api/models")[2])["models"][0]["name"]
    status, _, text = post(url, "/api/model", {"model": name})
    assert status == 200
    answer = json.loads(text)
    assert answer["success"] is False and "is the segmenter running" in answer["message"]


def test_a_slow_browser_does_not_make_the_node_grow(ros, dashboard, onlooker):
    node, url = dashboard(picture_rate=30.0, picture_width=1280, picture_quality=100)
    talk = Talk(ros, size=(480, 320))  # what fits a test's own shared memory
    rng = np.random.default_rng(0)
    talk._pixels[:] = rng.integers(0, 256, talk._pixels.shape, np.uint8)  # large as JPEGs
    quick = onlooker(url)
    assert talk.until(lambda: len(quick.pictures) >= 5), node.output()
    assert len(quick.pictures[-1][1]) > 150_000
    slow = [onlooker(url, answers=False) for _ in range(6)]
    assert talk.until(lambda: all(one.states for one in slow))
    process = psutil.Process(node.process.pid)
    before, seen = process.memory_info().rss, len(quick.pictures)
    assert talk.until(lambda: len(quick.pictures) >= seen + 60, 120), "the quick one goes on"
    assert process.memory_info().rss - before < 30e6
    for one in slow:
        assert len(one.states) + len(one.pictures) <= web.AHEAD


def test_the_token_is_nowhere_to_be_read(ros, dashboard, monkeypatch):
    from rcl_interfaces.srv import ListParameters

    monkeypatch.setenv("WASTE_SEG_DASHBOARD_TOKEN", TOKEN)
    node, url = dashboard()
    assert url.endswith(f"?token={TOKEN}")
    assert ask(url.partition("?")[0])[0] == 401
    assert node.output().count(TOKEN) == 1, "but for the URL"
    listed = ros.call(ListParameters, "/dashboard/list_parameters", ListParameters.Request())
    assert "port" in listed.result.names
    assert not [name for name in listed.result.names if "token" in name]
    assert TOKEN not in " ".join(psutil.Process(node.process.pid).cmdline())


def test_the_command_says_why_it_cannot_start(serve):
    _, server = serve()
    command = [sys.executable, "-m", "waste_seg_ros.cli", "dashboard"]
    taken = subprocess.run(
        [*command, "--port", str(server.port)], capture_output=True, text=True, timeout=90
    )
    assert taken.returncode == 1
    assert f"port {server.port}" in taken.stderr + taken.stdout
    short = subprocess.run(
        [*command, "--port", "0", "--token", "short"], capture_output=True, text=True, timeout=90
    )
    assert short.returncode == 1
    assert "at least 16" in short.stderr + short.stdout


def test_the_shipped_parameter_file_shows_the_defaults(ros, start_node):
    from rcl_interfaces.srv import DescribeParameters, GetParameters
    from rclpy.parameter import parameter_value_to_python

    from waste_seg_ros.graph import sorter_graph

    (spec,) = (spec for spec in sorter_graph(dashboard=True) if spec.name == "dashboard")
    assert not spec.required and spec.parameters == {}
    text = yaml.safe_load(Path(spec.parameter_files[0]).read_text())
    shipped = text["/**/dashboard"]["ros__parameters"]
    start_node("dashboard", {"port": 0})
    request = GetParameters.Request(names=list(shipped))
    response = ros.call(GetParameters, "/dashboard/get_parameters", request, timeout=60)
    declared = map(parameter_value_to_python, response.values)
    values = dict(zip(shipped, declared, strict=True))
    assert values == {**shipped, "port": 0}
    described = ros.call(
        DescribeParameters,
        "/dashboard/describe_parameters",
        DescribeParameters.Request(names=list(shipped)),
    )
    assert all(entry.description for entry in described.descriptors)


def test_the_graph_hands_the_dashboard_what_it_needs():
    from waste_seg_ros.graph import sorter_graph

    specs = sorter_graph(
        dashboard=True,
        namespace="line1",
        image_topic="/cam/image",
        image_transport="compressed",
        segmenter_parameters={"bundles_dir": "/models"},
    )
    (spec,) = (spec for spec in specs if spec.name == "dashboard")
    assert spec.parameters == {"image_transport": "compressed", "bundles_dir": "/models"}
    assert spec.namespace == "line1"
    assert spec.remappings["image_raw"] == "/cam/image"
    assert spec.remappings["camera_info"] == "/cam/camera_info"
    assert "dashboard" not in {spec.name for spec in sorter_graph()}


def test_stamps_are_read_from_serialized_messages(ros):
    from rclpy.serialization import serialize_message

    image = Image()
    image.header.frame_id = "odd"
    image.header.stamp.sec, image.header.stamp.nanosec = 1234567890, 987654321
    assert serialized_stamp(serialize_message(image)) == 1234567890_987654321


# --- a real browser -----------------------------------------------------------------------------


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


class Chromium:
    """Headless Chromium, told what to do by its DevTools protocol."""

    def __init__(self, folder):
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
        )
        self._process = subprocess.Popen(
            [
                *(CHROMIUM, *flags.split(), "--disable-dev-shm-usage"),
                *("--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        port_file = Path(folder) / "DevToolsActivePort"
        assert wait_for(lambda: port_file.exists() and port_file.read_text().count("\n"), 90)
        port = port_file.read_text().splitlines()[0]
        url = f"http://127.0.0.1:{port}"
        pages = wait_for(
            lambda: [p for p in json.loads(ask(url, path="/json")[2]) if p["type"] == "page"], 30
        )
        self.problems = []
        self._loop = asyncio.new_event_loop()
        self._calls = 0
        self._loop.run_until_complete(self._open(pages[0]["webSocketDebuggerUrl"]))

    async def _open(self, url):
        self._session = aiohttp.ClientSession()
        self._ws = await self._session.ws_connect(url, max_msg_size=0)

    def call(self, method, **parameters):
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), 90))

    async def _call(self, method, parameters):
        self._calls += 1
        mine = self._calls
        await self._ws.send_json({"id": mine, "method": method, "params": parameters})
        while True:
            said = await self._ws.receive_json()
            if said.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(said["params"])
            if said.get("id") == mine:
                assert "error" not in said, said
                return said["result"]

    def run(self, script):
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def close(self):
        self._loop.run_until_complete(self._session.close())
        self._loop.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture
def chromium(tmp_path):
    if not CHROMIUM:
        pytest.skip("Chromium is not installed: apt install chromium")
    browser = Chromium(tmp_path / "profile")
    yield browser
    browser.close()


# Of what can be pressed, what is smaller than a finger.
SMALL = """[...document.querySelectorAll('button, select, summary, .choice')]
    .filter((e) => e.offsetParent && Math.min(e.offsetHeight, e.offsetWidth) < 44)
    .map((e) => e.outerHTML)"""


def test_the_page_in_a_browser(ros, dashboard, chromium, tmp_path):
    node, url = dashboard()
    port = urlsplit(url).port
    talk = Talk(ros)
    for domain in ("Page", "Runtime", "Log"):
        chromium.call(f"{domain}.enable")

    def size(width, height):
        chromium.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )

    size(1280, 800)
    chromium.call("Page.navigate", url=url)

    def text(name):
        # "" while the page is not there yet.
        return chromium.run(f"document.getElementById('{name}')?.textContent ?? ''")

    def drawn():
        return "bottle" in text("item-rows") and chromium.run(
            "(() => { const c = document.getElementById('view');"
            " const p = c.getContext('2d').getImageData(c.width / 20, c.height / 20, 1, 1).data;"
            " return p[0] > 150 && p[1] < 60; })()"
        )

    assert talk.until(drawn), chromium.problems
    assert text("status-text") == "segmenter: model"
    assert "give it another" in text("status-mend")
    assert text("in-view") == "1" and text("model-name") == "colours"
    assert float(text("rate")) > 0
    for width, height in ((1280, 800), (820, 1180), (390, 844)):
        size(width, height)
        assert chromium.run("document.documentElement.scrollWidth") <= width, "nothing sticks out"
        assert chromium.run(SMALL) == []
        shot = chromium.call("Page.captureScreenshot", format="png")["data"]
        picture = cv2.imdecode(np.frombuffer(base64.b64decode(shot), np.uint8), cv2.IMREAD_COLOR)
        assert picture.shape == (height, width, 3) and picture.std() > 10
    # By keyboard: the dialog opens, lists what there is, and Escape closes it.
    chromium.run("document.getElementById('open-model').focus()")
    for kind in ("keyDown", "keyUp"):
        enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        chromium.call("Input.dispatchKeyEvent", type=kind, **enter)
    assert talk.until(lambda: chromium.run("document.querySelectorAll('.choice').length") >= 3)
    assert chromium.run("document.getElementById('model-dialog').open") is True
    assert chromium.run(SMALL) == []
    for kind in ("keyDown", "keyUp"):
        escape = {"key": "Escape", "code": "Escape", "windowsVirtualKeyCode": 27}
        chromium.call("Input.dispatchKeyEvent", type=kind, **escape)
    assert talk.until(lambda: not chromium.run("document.getElementById('model-dialog').open"))
    for theme in ("dark", "light"):
        chromium.run("document.getElementById('theme').click()")
        seen = chromium.run("getComputedStyle(document.body).backgroundColor")
        red = int(re.search(r"\d+", seen).group())
        assert (
            red < 60
            if chromium.run("document.documentElement.dataset.theme") == "dark"
            else red > 200
        )
        assert theme
    # That pixels are read back often is the test's own doing.
    problems = [p for p in chromium.problems if "readback" not in str(p)]
    assert problems == [], "no errors, and nothing that the policy forbids"

    # The node ends and comes back: the page says so, and goes on by itself.
    assert node.stop() == 0
    assert wait_for(lambda: "No connection" in text("status-text"), 30)
    dashboard(port=port)
    assert talk.until(lambda: text("status-text") == "segmenter: model", 60)
