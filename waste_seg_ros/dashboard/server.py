"""The dashboard's web server: pages, a WebSocket with what is going on, and the changing of models.

It runs in a thread of its own and knows the line only by :class:`Line`. What is sent is always the
newest, made when somebody is ready for it: each message is answered by the browser when it is
drawn, and a viewer with `AHEAD` unanswered ones gets no more, so that a slow one sees fewer
pictures, not older ones, and nothing piles up for it.

Who may see it: on a loopback address everyone on this machine, by a name of this machine only (a
page of a name that was made to lead here, DNS rebinding, is refused). On any other address whoever
has the token; the URL with it is exchanged for a cookie. Requests that change something, and the
WebSocket, must come from a page of this very server. Only the files named here are served.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hashlib
import hmac
import ipaddress
import itertools
import json
import re
import secrets
import socket
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from aiohttp import WSCloseCode, WSMsgType, web

from waste_seg_ros.dashboard.state import LineState

FILES = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
STATIC = Path(__file__).parent / "static"
STATE_EVERY = 0.5
"""Seconds between two states."""
AHEAD = 2
"""Messages that may be under way to a viewer."""
PATIENCE = 20.0
"""Seconds after which a viewer that answers nothing is let go."""
CHANGE_PATIENCE = 90.0
"""Seconds that the segmenter may take to load a model."""
MAX_VIEWERS = 12
MAX_BODY = 4096
"""Bytes of a request's body, and of what a browser says on the WebSocket."""
MIN_TOKEN = 16
"""Characters of a token."""
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}(:\d{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:\d{1,5})?")


class ServerError(RuntimeError):
    """The server cannot start; the text names the cause and the mend."""


@dataclass(frozen=True, eq=False)
class Picture:
    """What there is to draw.

    Attributes:
        key: differs from that of any other picture.
        make: makes what goes with it, plain values, and the JPEG, which is empty where there is no
            image; takes some milliseconds.
    """

    key: tuple[int, ...]
    make: Callable[[], tuple[dict[str, Any], bytes]]


@dataclass(frozen=True)
class Answer:
    """What came of a change of the model."""

    success: bool
    message: str
    model: str


class Line(Protocol):
    """What the server shows and steers. Called from the server's threads."""

    state: LineState

    def picture(self) -> Picture | None:
        """The newest picture; cheap."""

    def models(self) -> list[dict[str, Any]]:
        """The bundles there are, each with ``name``; reads files."""

    def select_model(self, name: str, backend: str) -> Future[Answer]:
        """Change the model; may wait for who does it."""

    def roll_back(self) -> Future[Answer]:
        """Go back to the model before."""

    def watched(self, viewers: int) -> None:
        """Say how many want to see pictures."""


def is_loopback(host: str) -> bool:
    """Whether an address to listen at is one of this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _same(given: str, secret: str) -> bool:
    """Compare in a time that tells nothing; headers may hold bytes that are no UTF-8."""
    return hmac.compare_digest(given.encode(errors="surrogateescape"), secret.encode())


class Allowance:
    """So many times at once, and one more each so many seconds."""

    def __init__(self, times: int, seconds: float) -> None:
        self._times, self._seconds = times, seconds
        self._left, self._at = float(times), time.monotonic()

    def take(self) -> float:
        """Use one up and return 0, or return the seconds until there is one."""
        now = time.monotonic()
        self._left = min(self._times, self._left + (now - self._at) / self._seconds)
        self._at = now
        if self._left >= 1:
            self._left -= 1
            return 0.0
        return (1 - self._left) * self._seconds

    def empty(self) -> bool:
        """Whether there is none now."""
        return self._left + (time.monotonic() - self._at) / self._seconds < 1


class Door:
    """Decides who comes in.

    Args:
        host: address to listen at.
        token: what lets in; empty for none, or on other than loopback addresses for a new one.

    Raises:
        ServerError: the token is too short.
    """

    def __init__(self, host: str, token: str = "") -> None:
        if token and (len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable()):
            raise ServerError(
                f"the token must be of at least {MIN_TOKEN} printable ASCII characters; "
                "leave it out to get a new one"
            )
        if not token and not is_loopback(host):
            token = secrets.token_urlsafe(24)
        self.token = token
        self._names = {"localhost", "127.0.0.1", "[::1]", host, f"[{host}]"}
        # Known only to whoever knows the token, and slow to make: a token cannot be guessed at by
        # way of the cookie.
        salt = b"waste_seg_ros dashboard"
        self._session = (
            hashlib.scrypt(token.encode(), salt=salt, n=1 << 14, r=8, p=1, dklen=32).hex()
            if token
            else ""
        )
        self._failures: OrderedDict[str, Allowance] = OrderedDict()

    def check_host(self, request: web.Request) -> None:
        """Refuse a Host header that is none, or without a token is not this machine's name."""
        host = request.headers.get("Host", "")
        if not _HOST.fullmatch(host):
            raise web.HTTPBadRequest(text="no valid Host header")
        name = re.sub(r":\d+$", "", host)
        if not self.token and name.lower() not in self._names:
            raise web.HTTPForbidden(text=f"{name} is not a name of this machine; use localhost")

    def check_origin(self, request: web.Request) -> None:
        """Refuse what does not come from a page of this server."""
        origin = urlsplit(request.headers.get("Origin", ""))
        if origin.scheme not in ("http", "https") or origin.netloc != request.headers.get("Host"):
            raise web.HTTPForbidden(text="the Origin is not this dashboard")

    def admit(self, request: web.Request) -> bool:
        """Let in by cookie or header; True if it is to be given the cookie.

        Raises HTTPUnauthorized, or HTTPTooManyRequests after many wrong tokens.
        """
        if not self.token:
            return False
        cookie = request.cookies.get(self.cookie_name(request), "")
        if _same(cookie, self._session):
            return False
        kind, _, bearer = request.headers.get("Authorization", "").partition(" ")
        given = request.query.get("token", "") if request.path == "/" else ""
        given = given or (bearer if kind.lower() == "bearer" else "")
        if given:
            failures = self._failures_of(request.remote or "")
            if failures.empty():
                raise web.HTTPTooManyRequests(text="too many wrong tokens; wait a minute")
            if _same(given, self.token):
                return True
            failures.take()
        raise web.HTTPUnauthorized(
            text="This dashboard needs its token: open the URL that it printed when it started.",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def cookie_name(self, request: web.Request) -> str:
        """Browsers do not tell ports apart, but two dashboards may run on one machine."""
        port = re.search(r":(\d+)$", request.headers.get("Host", ""))
        return f"waste_seg_{port.group(1) if port else 'web'}"

    def give_cookie(self, request: web.Request, response: web.StreamResponse) -> None:
        """Spare the browser the token from now on."""
        response.set_cookie(
            self.cookie_name(request),
            self._session,
            max_age=30 * 86400,
            httponly=True,
            samesite="Strict",
            secure=request.headers.get("X-Forwarded-Proto") == "https",
            path="/",
        )

    def _failures_of(self, address: str) -> Allowance:
        if address not in self._failures:
            while len(self._failures) >= 1024:
                self._failures.popitem(last=False)
            self._failures[address] = Allowance(10, 6.0)
        self._failures.move_to_end(address)
        return self._failures[address]


class Viewer:
    """A browser that looks on."""

    def __init__(self, socket: web.WebSocketResponse) -> None:
        self.socket = socket
        self.wake = asyncio.Event()
        self.visible = True
        self.picture: tuple[int, ...] = ()
        self.point = 0
        self.state_due = 0.0
        self._sent = 0
        self._answered = 0
        self._answered_at = time.monotonic()

    def ready(self) -> bool:
        """Whether it has drawn what it was sent."""
        return self._sent - self._answered < AHEAD

    def patient(self) -> bool:
        """Whether it has answered of late, or had nothing to answer."""
        late = time.monotonic() - self._answered_at > PATIENCE
        return self._sent == self._answered or not late

    def hear(self, text: str) -> None:
        """Take what the browser says: ``{"got": n}`` or ``{"visible": true}``.

        Raises ValueError if it is something else.
        """
        said = json.loads(text)
        if not isinstance(said, dict):
            raise ValueError("no object")
        got = said.get("got")
        if isinstance(got, int) and self._answered < got <= self._sent:
            self._answered, self._answered_at = got, time.monotonic()
        if isinstance(said.get("visible"), bool):
            self.visible = said["visible"]
        self.wake.set()

    async def send(self, header: dict[str, Any], image: bytes | None = None) -> None:
        """Send a state or a picture: length of the header, the header, the JPEG."""
        if self._sent == self._answered:
            self._answered_at = time.monotonic()  # from now on it owes an answer
        self._sent += 1
        text = json.dumps({**header, "n": self._sent}, separators=(",", ":"), allow_nan=False)
        if image is None:
            await self.socket.send_str(text)
        else:
            encoded = text.encode()
            await self.socket.send_bytes(struct.pack("<I", len(encoded)) + encoded + image)


class Dashboard:
    """The web application over a line.

    Args:
        line: what to show.
        door: who may see it.
        rate: most pictures a second.
    """

    def __init__(self, line: Line, door: Door, rate: float) -> None:
        self._line, self._door, self._rate = line, door, rate
        self._viewers: set[Viewer] = set()
        self._changes = Allowance(10, 6.0)
        self._changing = asyncio.Lock()
        self._files = {
            path: (STATIC.joinpath(name).read_bytes(), kind) for path, (name, kind) in FILES.items()
        }
        self._frame: tuple[tuple[int, ...], dict[str, Any], bytes] = ((), {}, b"")
        # One thread: pictures are made one after the other, beside the loop.
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="picture")
        self.app = web.Application(client_max_size=MAX_BODY, middlewares=[self._guard])
        for path in self._files:
            self.app.router.add_get(path, self._file)
        self.app.router.add_get("/live", self._live)
        self.app.router.add_get("/api/models", self._models)
        self.app.router.add_post("/api/model", self._select_model)
        self.app.router.add_post("/api/rollback", self._roll_back)
        self.app.on_response_prepare.append(self._seal)
        self.app.cleanup_ctx.append(self._making)
        self.app.on_shutdown.append(self._send_away)

    # --- who comes in -------------------------------------------------------------------------

    @web.middleware
    async def _guard(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        self._door.check_host(request)
        fresh = self._door.admit(request)
        if request.method not in ("GET", "HEAD") or request.path == "/live":
            self._door.check_origin(request)
        if request.query.get("token") and request.path == "/":
            # Out of the address bar, the history and what is told to others.
            response: web.StreamResponse = web.HTTPSeeOther("/")
            if fresh:
                self._door.give_cookie(request, response)
            raise response  # type: ignore[misc]
        return await handler(request)

    async def _seal(self, request: web.Request, response: web.StreamResponse) -> None:
        host = request.headers.get("Host", "")
        socket = f"ws://{host} wss://{host}" if _HOST.fullmatch(host) else ""
        response.headers.update(
            {
                "Content-Security-Policy": "default-src 'none'; script-src 'self'; "
                f"style-src 'self'; img-src 'self'; connect-src 'self' {socket}; "
                "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cross-Origin-Opener-Policy": "same-origin",
                "Cross-Origin-Resource-Policy": "same-origin",
                "Cache-Control": "no-store",
                "Server": "waste-seg",
            }
        )

    # --- pages and changes --------------------------------------------------------------------

    async def _file(self, request: web.Request) -> web.Response:
        content, kind = self._files[request.path]
        return web.Response(body=content, content_type=kind, charset="utf-8")

    async def _models(self, request: web.Request) -> web.Response:
        models = await asyncio.get_running_loop().run_in_executor(None, self._line.models)
        return web.json_response({"models": models})

    async def _select_model(self, request: web.Request) -> web.Response:
        self._limit()
        said = await self._said(request)
        name, backend = said.get("model"), said.get("backend", "")
        if not isinstance(name, str) or not isinstance(backend, str):
            raise web.HTTPBadRequest(text="model and backend are texts")
        models = await asyncio.get_running_loop().run_in_executor(None, self._line.models)
        # By name only, from the list: nobody names folders of this machine from afar.
        if name not in {model["name"] for model in models}:
            raise web.HTTPNotFound(text="no such model")
        return await self._change(lambda: self._line.select_model(name, backend))

    async def _roll_back(self, request: web.Request) -> web.Response:
        self._limit()
        await self._said(request)
        return await self._change(self._line.roll_back)

    def _limit(self) -> None:
        wait = self._changes.take()
        if wait:
            raise web.HTTPTooManyRequests(
                text=f"too many changes; wait {wait:.0f} s", headers={"Retry-After": f"{wait:.0f}"}
            )

    async def _said(self, request: web.Request) -> dict[str, Any]:
        if request.content_type != "application/json":
            raise web.HTTPUnsupportedMediaType(text="the body must be application/json")
        try:
            said = json.loads(await request.text())
        except (ValueError, RecursionError):
            raise web.HTTPBadRequest(text="the body is not JSON") from None
        if not isinstance(said, dict):
            raise web.HTTPBadRequest(text="the body is not an object")
        return said

    async def _change(self, change: Callable[[], Future[Answer]]) -> web.Response:
        if self._changing.locked():
            raise web.HTTPConflict(text="another change of the model is under way")
        async with self._changing:
            asked = await asyncio.get_running_loop().run_in_executor(None, change)
            try:
                answer = await asyncio.wait_for(asyncio.wrap_future(asked), CHANGE_PATIENCE)
            except TimeoutError:
                text = f"no answer within {CHANGE_PATIENCE:.0f} s; see what the segmenter prints"
                answer = Answer(False, text, self._line.state.model)
        return web.json_response(
            {"success": answer.success, "message": answer.message, "model": answer.model}
        )

    # --- the live view ------------------------------------------------------------------------

    async def _live(self, request: web.Request) -> web.WebSocketResponse:
        if len(self._viewers) >= MAX_VIEWERS:
            raise web.HTTPServiceUnavailable(text=f"{MAX_VIEWERS} look on already")
        # Not compressed: it would cost more time here than it saves on the way.
        ws = web.WebSocketResponse(
            heartbeat=PATIENCE, max_msg_size=MAX_BODY, compress=False, timeout=2.0
        )
        await ws.prepare(request)
        viewer = Viewer(ws)
        self._viewers.add(viewer)
        feed = asyncio.create_task(self._feed(viewer))
        said = Allowance(200, 0.01)
        try:
            async for message in ws:
                if message.type != WSMsgType.TEXT or said.take():
                    await ws.close(code=WSCloseCode.POLICY_VIOLATION)
                    break
                try:
                    viewer.hear(message.data)
                except (ValueError, RecursionError):
                    await ws.close(code=WSCloseCode.POLICY_VIOLATION)
                    break
        finally:
            self._viewers.discard(viewer)
            feed.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError, RuntimeError):
                await feed
        return ws

    async def _feed(self, viewer: Viewer) -> None:
        """Send what is new, as fast as it is drawn."""
        try:
            while not viewer.socket.closed:
                now = time.monotonic()
                if viewer.ready() and now >= viewer.state_due:
                    viewer.state_due = now + STATE_EVERY
                    await asyncio.wait_for(viewer.send(self._state(viewer)), PATIENCE)
                key, header, image = self._frame
                if viewer.ready() and viewer.visible and key != viewer.picture:
                    viewer.picture = key
                    await asyncio.wait_for(viewer.send(header, image), PATIENCE)
                if not viewer.patient():
                    break
                viewer.wake.clear()
                wait = max(viewer.state_due - time.monotonic(), 0.02) if viewer.ready() else 1.0
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(viewer.wake.wait(), wait)
        except (TimeoutError, ConnectionError):
            pass
        # Not close(), which would wait for the one who does not answer.
        await viewer.socket.close(code=WSCloseCode.TRY_AGAIN_LATER, drain=False)

    def _state(self, viewer: Viewer) -> dict[str, Any]:
        points = self._line.state.history(viewer.point)
        if points:
            viewer.point = int(points[-1][0] or 0)
        return {
            "kind": "state",
            **self._line.state.snapshot(),
            "points": points,
            "viewers": len(self._viewers),
        }

    async def _making(self, app: web.Application) -> Any:
        task = asyncio.create_task(self._make_pictures())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        self._maker.shutdown(wait=False, cancel_futures=True)

    async def _make_pictures(self) -> None:
        """Make the newest picture, while somebody is ready to draw it."""
        loop = asyncio.get_running_loop()
        watched = -1
        for number in itertools.count():
            begin = loop.time()
            wanting = [v for v in self._viewers if v.visible]
            if len(wanting) != watched or number % 20 == 0:
                watched = len(wanting)
                self._line.watched(watched)
            if any(viewer.ready() for viewer in wanting):
                picture = self._line.picture()
                if picture is not None and picture.key != self._frame[0]:
                    header, image = await loop.run_in_executor(self._maker, picture.make)
                    header |= {"kind": "picture", "colors": self._line.state.colors()}
                    self._frame = (picture.key, header, image)
                    for viewer in wanting:
                        viewer.wake.set()
            pause = 1 / self._rate if wanting else 0.2
            await asyncio.sleep(max(0.005, pause - (loop.time() - begin)))

    async def _send_away(self, app: web.Application) -> None:
        for viewer in list(self._viewers):
            await viewer.socket.close(code=WSCloseCode.GOING_AWAY, message=b"the dashboard ends")


class Server:
    """A dashboard that listens, in a thread of its own.

    Raises:
        ServerError: it cannot listen at the address.
    """

    def __init__(self, line: Line, host: str, port: int, token: str = "", rate: float = 10) -> None:
        self.door = Door(host, token)
        self.port = port
        self._host = host
        self._line, self._rate = line, rate
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        started: Future[int] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="dashboard", daemon=True
        )
        self._thread.start()
        try:
            self.port = started.result(timeout=30.0)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ServerError(
                f"cannot listen at {host} port {port}: {reason}; choose another by host and port"
            ) from error

    @property
    def url(self) -> str:
        """Where to open it, with the token if it needs one."""
        host = self._host
        if host in ("0.0.0.0", "::", ""):
            host = _own_address()
        if ":" in host:
            host = f"[{host}]"
        query = f"?token={quote(self.door.token, safe='')}" if self.door.token else ""
        return f"http://{host}:{self.port}/{query}"

    def _run(self, started: Future[int]) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve(started))
        finally:
            self._loop.close()

    async def _serve(self, started: Future[int]) -> None:
        dashboard = Dashboard(self._line, self.door, self._rate)
        runner = web.AppRunner(
            dashboard.app, access_log=None, keepalive_timeout=20.0, shutdown_timeout=1.0
        )
        try:
            try:
                await runner.setup()
                await web.TCPSite(runner, self._host, self.port).start()
            except (OSError, UnicodeError) as error:
                known = error if isinstance(error, OSError) else OSError(str(error))
                started.set_exception(known)
                return
            started.set_result(int(runner.addresses[0][1]))
            await self._stop.wait()
        finally:
            await runner.cleanup()

    def stop(self, timeout: float = 4.0) -> bool:
        """Send all viewers away and end; says whether it has ended."""
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout)
        return not self._thread.is_alive()


def _own_address() -> str:
    """The address by which others on the network are likely to reach this machine."""
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
    ):
        probe.connect(("192.0.2.1", 9))  # sends nothing: only a route is chosen
        return str(probe.getsockname()[0])
    return socket.gethostname()
