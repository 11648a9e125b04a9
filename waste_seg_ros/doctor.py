"""``waste-seg doctor``: look whether all that the sorter needs is in place, and tell the mends.

Each check gives lines of three levels: ok, warn (it works, or may, but not as it should) and FAIL
(it will not work). What is not needed, such as a GPU, is ok when it is not there. The exit code is
1 where a line says FAIL.

DDS is tried as the nodes use it: a process answers another over the middleware, once with small
messages and once with images, with the transports that the nodes take and with UDP alone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import secrets
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from waste_seg_ros.files import write_json
from waste_seg_ros.runtime import AUTO_ORDER

OK, WARN, FAIL = "ok", "warn", "FAIL"

DISTRO = "jazzy"
RMW = "rmw_fastrtps_cpp"
PINGS = 10
IMAGE = (480, 640, 3)
"""Of the images sent in the round trip."""
MATCH_WITHIN = 20.0
"""Seconds in which two processes must find each other; most of it is their start."""
_UNKNOWN = "_UNKNOWN_"
"""In the names that rmw gives to a node of which it has heard only a topic."""
BUFFER = 4 << 20
"""Bytes of socket buffer that ``config/fastdds.xml`` asks for."""

# What pip installs a module as, and whether the robot cannot do without it.
MODULES = (
    ("numpy", "numpy", True),
    ("cv2", "opencv-python-headless", True),
    ("scipy", "scipy", True),
    ("yaml", "PyYAML", True),
    ("rich", "rich", True),
    ("safetensors", "safetensors", True),
    ("mcap_ros2", "mcap-ros2-support", False),
    ("aiohttp", "aiohttp", False),
)


@dataclass(frozen=True)
class Line:
    """What a check has found.

    Attributes:
        name: what was looked at.
        level: ok, warn or FAIL.
        text: what was found.
        mend: what to do, "" where nothing is to be done.
    """

    name: str
    level: str
    text: str
    mend: str = ""


@dataclass(frozen=True)
class Options:
    """What to look at; see ``add_arguments``."""

    model: str
    backends: tuple[str, ...]
    calibration: str
    namespace: str
    image_topic: str
    image_transport: str
    params_file: Path | None
    folder: Path
    wait: float
    camera: bool


# --- this machine ---------------------------------------------------------------------------------


def check_python(options: Options) -> Iterator[Line]:
    """Python and the packages."""
    yield Line("Python", OK, f"{platform.python_version()} ({sys.executable})")
    for module, package, needed in MODULES:
        if importlib.util.find_spec(module) is None:
            level = FAIL if needed else WARN
            yield Line(package, level, "not installed", f"pip install {package}")
    yield from check_numpy()
    yield from check_opencv()


def check_numpy() -> Iterator[Line]:
    """NumPy against cv_bridge, which is built for NumPy 1."""
    from waste_seg_ros.nodes.images import ImageError, require_decompression

    version = np.__version__
    bridge = importlib.util.find_spec("cv_bridge") is not None
    if not bridge:
        yield Line("NumPy", OK, f"{version}; no cv_bridge")
        yield Line(
            "cv_bridge",
            WARN,
            "not installed: compressed images cannot be read, raw ones can",
            "apt install ros-jazzy-cv-bridge, or pip install cv-bridge",
        )
        return
    if int(version.split(".")[0]) >= 2:
        yield Line(
            "NumPy",
            FAIL,
            f"{version}, but cv_bridge is built for NumPy 1",
            "pip install 'numpy<2'",
        )
        return
    try:
        require_decompression()
    except ImageError as error:
        yield Line("cv_bridge", FAIL, str(error), "pip install 'numpy<2'; or use raw images")
        return
    yield Line("NumPy", OK, f"{version}, and cv_bridge works with it")


def check_opencv() -> Iterator[Line]:
    """OpenCV, of which pip installs several over each other."""
    try:
        import cv2
    except ImportError as error:
        yield Line(
            "OpenCV",
            FAIL,
            f"does not import: {error}",
            "pip install opencv-python-headless (opencv-python needs libGL)",
        )
        return
    found = []
    for name in (
        "opencv-python",
        "opencv-python-headless",
        "opencv-contrib-python",
        "opencv-contrib-python-headless",
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    if len(found) > 1:
        yield Line(
            "OpenCV",
            WARN,
            f"{' and '.join(found)} write to the same folder",
            "pip uninstall all of them, then pip install opencv-python-headless",
        )
    elif not hasattr(cv2, "aruco") or not hasattr(cv2.aruco, "CharucoDetector"):
        yield Line(
            "OpenCV",
            WARN,
            f"{cv2.__version__} finds no ArUco boards; chessboards it does",
            "pip install 'opencv-python-headless>=4.7,<4.12'",
        )
    else:
        yield Line("OpenCV", OK, cv2.__version__)


def check_threads(options: Options) -> Iterator[Line]:
    """Cores that this process may use, and how busy they are."""
    cores = len(os.sched_getaffinity(0))
    there = os.cpu_count() or cores
    text = f"{cores} of {there} cores"
    quota = _quota()
    load = os.getloadavg()[0]
    if quota is not None and quota < cores - 0.5:
        yield Line(
            "threads",
            WARN,
            f"{text}, but the container may use {quota:.1f}",
            f"set the segmenter's parameter threads to {max(1, int(quota))}, or raise --cpus",
        )
    elif load > 1.5 * cores:
        yield Line(
            "threads",
            WARN,
            f"{text}, busy: {load:.1f} processes want them (mean of a minute)",
            "end what else runs here (top), or figures will be worse than they need be",
        )
    else:
        yield Line("threads", OK, f"{text}, load {load:.1f}")
    variable = os.environ.get("OMP_NUM_THREADS", "")
    if variable and variable != str(cores):
        yield Line(
            "OMP_NUM_THREADS",
            WARN,
            f"is {variable}; torch takes no more threads than that",
            "unset OMP_NUM_THREADS, and use the segmenter's parameter threads",
        )


def _quota() -> float | None:
    """Cores that a container's control group allows (cgroup v2, v1), None for no limit."""
    with contextlib.suppress(OSError, ValueError):
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    folder = Path("/sys/fs/cgroup/cpu")
    with contextlib.suppress(OSError, ValueError):
        limit = (folder / "cpu.cfs_quota_us").read_text()
        period = (folder / "cpu.cfs_period_us").read_text()
        return int(limit) / int(period) if int(limit) > 0 else None
    return None


def check_disk(options: Options) -> Iterator[Line]:
    """Room for recordings and logs."""
    places = {
        "disk": options.folder,
        "ROS log folder": Path(
            os.environ.get("ROS_LOG_DIR")
            or Path(os.environ.get("ROS_HOME", "~/.ros")).expanduser() / "log"
        ),
    }
    for name, place in places.items():
        there = place.expanduser().absolute()
        while not there.exists() and there != there.parent:
            there = there.parent
        try:
            usage = shutil.disk_usage(there)
        except OSError as error:
            yield Line(name, FAIL, f"{place}: {error.strerror}", "choose another folder")
            continue
        free = usage.free / 1e9
        text = f"{free:.1f} GB free at {place}"
        if not os.access(there, os.W_OK):
            mend = "chown it to you" if name == "disk" else "set ROS_LOG_DIR to a folder of yours"
            yield Line(name, WARN, f"{place} cannot be written to", mend)
        elif free < 0.5:
            yield Line(name, FAIL, text, "remove recordings and logs (du -sh * | sort -h)")
        elif free < 5:
            minutes = usage.free / (math.prod(IMAGE) * 20) / 60
            yield Line(
                name,
                WARN,
                f"{text}: raw images of 640x480 at 20 Hz fill it in {minutes:.0f} min",
                "remove recordings and logs, or record with --images compressed or --keep",
            )
        else:
            yield Line(name, OK, text)


def check_gpu(options: Options) -> Iterator[Line]:
    """A GPU and TensorRT; there need be none."""
    devices = sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))
    program = shutil.which("nvidia-smi")
    if not devices and program is None:
        yield Line("GPU", OK, "no NVIDIA GPU, which is fine: the networks are made for processors")
    elif program is None:
        yield Line(
            "GPU",
            WARN,
            f"{', '.join(devices)} but no nvidia-smi",
            "install the driver's tools (Jetson: nothing to do)",
        )
    else:
        query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=20)
            text = "; ".join(done.stdout.split("\n")).strip("; ") or done.stderr.strip()
            problem = done.returncode != 0
        except (OSError, subprocess.TimeoutExpired) as error:
            text, problem = str(error), True
        mend = "reinstall the driver, or restart after its update" if problem else ""
        yield Line("GPU", WARN if problem else OK, text.partition("\n")[0], mend)
    there = importlib.util.find_spec("tensorrt") is not None
    text = "installed; no backend here uses it" if there else "not installed, which is fine"
    yield Line("TensorRT", OK, text)


def check_shared_memory(options: Options) -> Iterator[Line]:
    """Room in /dev/shm, and which Fast DDS profile the nodes will take."""
    from waste_seg_ros.graph import share_folder
    from waste_seg_ros.nodes import SHARED_MEMORY_NEEDED

    try:
        memory = os.statvfs("/dev/shm")
    except OSError as error:
        yield Line(
            "shared memory",
            WARN,
            f"/dev/shm: {error.strerror}: images go over UDP",
            "mount a tmpfs on /dev/shm",
        )
        return
    free, size = (n * memory.f_frsize for n in (memory.f_bavail, memory.f_blocks))
    text = f"/dev/shm {free >> 20} MB free of {size >> 20} MB"
    enough = free >= SHARED_MEMORY_NEEDED
    if not os.access("/dev/shm", os.W_OK):
        yield Line("shared memory", WARN, "/dev/shm cannot be written to", "chmod 1777 /dev/shm")
    elif not enough:
        left = len(list(Path("/dev/shm").glob("fastrtps_*")))
        mend = "docker run --shm-size=1g (or --ipc=host)"
        if left > 20:
            mend = f"end all nodes and remove {left} leftovers (rm /dev/shm/fastrtps_*); or {mend}"
        yield Line(
            "shared memory",
            WARN,
            f"{text}: the nodes need {SHARED_MEMORY_NEEDED >> 20} MB to take the profile for "
            "images, and lose some without",
            mend,
        )
    else:
        yield Line("shared memory", OK, text)

    for name in ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"):
        chosen = os.environ.get(name, "")
        if chosen and not Path(chosen).is_file():
            yield Line(
                "Fast DDS profile",
                FAIL,
                f"{name} names {chosen}, which is not there",
                f"unset {name}, or name {share_folder() / 'config' / 'fastdds.xml'}",
            )
            return
        if chosen:
            yield Line("Fast DDS profile", OK, f"yours: {chosen}")
            return
    if variable := os.environ.get("FASTDDS_BUILTIN_TRANSPORTS"):
        yield Line("Fast DDS profile", OK, f"FASTDDS_BUILTIN_TRANSPORTS={variable}, no profile")
    elif Path("DEFAULT_FASTRTPS_PROFILES.xml").exists():
        yield Line("Fast DDS profile", OK, "DEFAULT_FASTRTPS_PROFILES.xml of this folder")
    elif not enough:
        yield Line("Fast DDS profile", OK, "none, see shared memory")
    else:
        yield Line("Fast DDS profile", OK, str(share_folder() / "config" / "fastdds.xml"))


# --- ROS ------------------------------------------------------------------------------------------


def check_ros(options: Options) -> Iterator[Line]:
    """ROS, its middleware, and this package's interfaces."""
    distro = os.environ.get("ROS_DISTRO", "")
    source = f"source /opt/ros/{DISTRO}/setup.bash, or use ./sorter"
    if not distro:
        yield Line("ROS", FAIL, "ROS_DISTRO is not set", source)
    elif distro != DISTRO:
        yield Line("ROS", WARN, f"{distro}; this package is tested with {DISTRO}", source)
    else:
        yield Line("ROS", OK, distro)
    # In a process of its own: a middleware that does not load may take the process with it.
    code = (
        "import rclpy; rclpy.init(); print(rclpy.get_rmw_implementation_identifier()); "
        "rclpy.shutdown()"
    )
    wanted = os.environ.get("RMW_IMPLEMENTATION", "")
    result = _python(code)
    if result.returncode:
        last = _last_line(result.stderr)
        if "No module named" in last:
            yield Line("rclpy", FAIL, last, source)
            return
        package = "ros-jazzy-" + (wanted or RMW).replace("_", "-")
        yield Line(
            "middleware",
            FAIL,
            f"{wanted or 'the default one'} does not start: {last}",
            f"apt install {package}, or export RMW_IMPLEMENTATION={RMW}",
        )
        return
    name = result.stdout.split()[-1]
    if name == RMW:
        yield Line("middleware", OK, name)
    else:
        yield Line(
            "middleware",
            WARN,
            f"{name}: not tested, and the profile for images is Fast DDS's",
            f"export RMW_IMPLEMENTATION={RMW} for all nodes",
        )
    yield from _interfaces()
    yield _discovery()


def _interfaces() -> Iterator[Line]:
    result = _python("import waste_seg_ros.msg, waste_seg_ros.srv; print('built')")
    if result.returncode:
        yield Line(
            "interfaces",
            FAIL,
            _last_line(result.stderr),
            "colcon build, then source install/setup.bash (or use ./sorter)",
        )
    else:
        yield Line("interfaces", OK, "waste_seg_ros.msg and .srv")


def _discovery() -> Line:
    environment = os.environ
    domain = environment.get("ROS_DOMAIN_ID") or "0"
    reach = environment.get("ROS_AUTOMATIC_DISCOVERY_RANGE") or "SUBNET"
    if environment.get("ROS_LOCALHOST_ONLY"):
        return Line(
            "discovery",
            WARN,
            "ROS_LOCALHOST_ONLY is set, which Jazzy has done away with",
            "unset it, and export ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST",
        )
    if not domain.isdecimal() or int(domain) > 232:
        return Line("discovery", FAIL, f"ROS_DOMAIN_ID={domain}", "export one of 0 to 101")
    if int(domain) > 101:
        return Line(
            "discovery",
            WARN,
            f"ROS_DOMAIN_ID={domain}: its ports are among those that Linux gives away",
            "export ROS_DOMAIN_ID of 0 to 101",
        )
    if reach == "OFF":
        return Line(
            "discovery",
            FAIL,
            "ROS_AUTOMATIC_DISCOVERY_RANGE=OFF: nodes do not find each other",
            "export ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST",
        )
    seen = "this machine only" if reach == "LOCALHOST" else "the whole network"
    return Line("discovery", OK, f"ROS_DOMAIN_ID={domain}, {reach}: {seen}")


def _python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", "no answer within 60 s")


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it ended without a word"


def check_network(options: Options) -> Iterator[Line]:
    """Loopback and multicast, and messages between two processes."""
    yield _multicast()
    yield _buffers()
    if importlib.util.find_spec("rclpy") is None:
        return
    ways = {"as the nodes do": {}, "over UDP alone": {"FASTDDS_BUILTIN_TRANSPORTS": "UDPv4"}}
    trips = {way: RoundTrip(environment) for way, environment in ways.items()}
    try:
        results = {way: trip.result() for way, trip in trips.items()}
    finally:
        for trip in trips.values():
            trip.close()
    usual, udp = results.values()
    local = os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE") == "LOCALHOST"
    if not usual.get("small"):
        works = bool(udp.get("small"))
        yield Line(
            "round trip",
            FAIL,
            f"two processes do not reach each other: {usual.get('problem', 'no answer')}"
            + ("; over UDP alone they do" if works else ""),
            "end all nodes and rm /dev/shm/fastrtps_*, or export FASTDDS_BUILTIN_TRANSPORTS=UDPv4"
            if works
            else "ip link set lo up; let UDP ports 7400 to 7700 and multicast 239.255.0.1 through "
            "the firewall (ufw allow 7400:7700/udp)",
        )
        return
    text = f"two processes, as the nodes do: {usual['milliseconds']:.1f} ms there and back"
    if usual["images"] < 0.8 * PINGS:
        yield Line(
            "round trip",
            WARN,
            f"{text}, but only {usual['images']} of {PINGS} images of 640x480 came",
            "see shared memory and Fast DDS profile above",
        )
    else:
        yield Line("round trip", OK, f"{text}, {usual['images']} of {PINGS} images")
    if not udp.get("small"):
        yield Line(
            "UDP",
            WARN,
            f"over UDP alone there is no answer ({udp.get('problem', '')}): nodes in other "
            "containers" + (" are" if local else " or on other machines are") + " not heard",
            "let UDP ports 7400 to 7700 through the firewall (ufw allow 7400:7700/udp); "
            "ip link set lo multicast on",
        )
    else:
        yield Line("UDP", OK, f"works, too: {udp['milliseconds']:.1f} ms there and back")


def _multicast() -> Line:
    """Send to DDS's group over the loopback and hear it."""
    group, word = "239.255.0.1", secrets.token_bytes(8)
    try:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ear,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mouth,
        ):
            ear.bind(("", 0))
            lo = socket.inet_aton("127.0.0.1")
            ear.setsockopt(
                socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + lo
            )
            ear.settimeout(1.0)
            mouth.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, lo)
            mouth.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, struct.pack("b", 0))
            mouth.sendto(word, (group, ear.getsockname()[1]))
            heard = ear.recv(64) == word
        problem = "" if heard else "another message came"
    except OSError as error:  # a timeout is one
        problem = str(error)
    if not problem:
        return Line("multicast", OK, f"{group} on the loopback")
    return Line(
        "multicast",
        WARN,
        f"{group} on the loopback: {problem}",
        "ip link set lo multicast on; ip route add 239.0.0.0/8 dev lo; look at the firewall. "
        "Without it nodes are found one by one (ROS_STATIC_PEERS)",
    )


def _buffers() -> Line:
    sizes = {}
    for name in ("rmem_max", "wmem_max"):
        with contextlib.suppress(OSError, ValueError):
            sizes[name] = int(Path(f"/proc/sys/net/core/{name}").read_text())
    text = ", ".join(f"net.core.{name} {size >> 10} kB" for name, size in sizes.items())
    small = [f"net.core.{name}={BUFFER}" for name, size in sizes.items() if size < BUFFER]
    if small:
        text += " (enough on one machine; for a camera on another: sysctl -w " + (
            " ".join(small) + ")"
        )
    return Line("socket buffers", OK, text or "not known here")


class RoundTrip:
    """Two processes that send to each other over DDS, started by making it."""

    def __init__(self, environment: Mapping[str, str], within: float = MATCH_WITHIN) -> None:
        """Start the processes.

        Args:
            environment: further variables for them.
            within: how long they may take to find each other [s].
        """
        self._within = within
        variables = {**os.environ, **environment}
        topic = f"waste_seg_doctor_{secrets.token_hex(6)}"
        code = "import sys; from waste_seg_ros.doctor import peer; peer(*sys.argv[1:])"
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", code, role, topic, str(within)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=variables,
                text=True,
            )
            for role in ("answer", "ask")
        ]

    def result(self) -> dict[str, Any]:
        """What came back: ``small`` and ``images`` of `PINGS`, the median ``milliseconds``."""
        answering, asking = self._processes
        try:
            out, err = asking.communicate(timeout=self._within + 60)
        except subprocess.TimeoutExpired:
            return {"problem": "the processes do not end"}
        if asking.returncode:
            if answering.poll():
                err = answering.communicate()[1]
            return {"problem": _last_line(err)}
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.communicate()


def peer(role: str, topic: str, within: str) -> None:
    """One end of a round trip: answers until it is ended, or asks and prints what came back."""
    import rclpy
    from rclpy.qos import QoSProfile, ReliabilityPolicy
    from sensor_msgs.msg import Image
    from std_msgs.msg import Header, String

    from waste_seg_ros.nodes import use_image_profile
    from waste_seg_ros.nodes.images import to_image

    use_image_profile()
    rclpy.init(args=[])
    node = rclpy.create_node(f"doctor_{role}")
    lossy = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    there, back = (f"/{topic}/{way}" for way in ("there", "back"))
    parent = os.getppid()
    if role == "answer":
        answer = node.create_publisher(String, back, 20)
        node.create_subscription(String, f"{there}/small", answer.publish, 20)
        node.create_subscription(
            Image,
            f"{there}/image",
            lambda message: answer.publish(String(data=message.header.frame_id)),
            lossy,
        )
        while os.getppid() == parent:
            rclpy.spin_once(node, timeout_sec=0.2)
        return

    heard: list[str] = []
    node.create_subscription(String, back, lambda message: heard.append(message.data), 20)
    small = node.create_publisher(String, f"{there}/small", 20)
    images = node.create_publisher(Image, f"{there}/image", 5)

    def spin(done: Callable[[], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not done() and time.monotonic() < end:
            rclpy.spin_once(node, timeout_sec=0.02)
        return done()

    def matched() -> bool:
        counts = (small.get_subscription_count(), images.get_subscription_count())
        return all(counts) and node.count_publishers(back) > 0

    result: dict[str, Any] = {"small": 0, "images": 0}
    if not spin(matched, float(within)):
        print(json.dumps({"problem": f"they did not find each other in {float(within):.0f} s"}))
        return

    def known() -> bool:  # that we know the other does not mean that it knows us
        small.publish(String(data="hello"))
        return spin(lambda: bool(heard), 0.2)

    if not spin(known, 5.0):
        print(json.dumps({"problem": "they found each other, but no message came"}))
        return
    times = []
    for number in range(PINGS):
        begin = time.perf_counter()
        small.publish(String(data=f"small {number}"))
        if spin(lambda number=number: f"small {number}" in heard, 1.0):  # type: ignore[misc]
            times.append(1e3 * (time.perf_counter() - begin))
    result["small"] = len(times)
    result["milliseconds"] = statistics.median(times) if times else math.nan
    pixels = np.zeros(IMAGE, np.uint8)
    for number in range(PINGS):
        name = f"image {number}"
        images.publish(to_image(pixels, "rgb8", Header(frame_id=name)))
        result["images"] += spin(lambda name=name: name in heard, 0.5)  # type: ignore[misc]
    print(json.dumps(result))


# --- the line -------------------------------------------------------------------------------------


def check_camera(options: Options) -> Iterator[Line]:
    """The camera's topics, with the eyes of the segmenter."""
    if importlib.util.find_spec("rclpy") is None:
        return
    import rclpy
    from rclpy.signals import SignalHandlerOptions

    from waste_seg_ros.nodes import use_image_profile

    use_image_profile()
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = rclpy.create_node("doctor")
        yield from _camera(node, options)
        node.destroy_node()
    finally:
        rclpy.try_shutdown()


def _camera(node: Any, options: Options) -> Iterator[Line]:
    import rclpy
    from sensor_msgs.msg import CameraInfo, CompressedImage, Image

    compressed = options.image_transport == "compressed"
    base = "/" + options.namespace.strip("/")
    raw = options.image_topic
    raw = raw if raw.startswith("/") else f"{base.rstrip('/')}/{raw}"
    topic = raw + "/compressed" if compressed else raw
    expected = "sensor_msgs/msg/" + ("CompressedImage" if compressed else "Image")
    publishers = _publishers(node, topic, options.wait)
    if not publishers:
        yield _nobody(node, topic, options)
        return
    other = next((p for p in publishers if p.topic_type != expected), None)
    if other is not None:
        transport = "raw" if compressed else "compressed"
        yield Line(
            "camera",
            FAIL,
            f"{_who(other)} publishes {topic} as {other.topic_type}, not {expected}",
            f"set image_transport to {transport}, or name the right topic (image_topic:=TOPIC)",
        )
        return
    qos, overridden = _segmenter_qos(topic, options)
    mismatches = list(_mismatches(node, topic, publishers, qos, overridden))
    yield from mismatches
    if any(line.level == FAIL for line in mismatches):
        return

    images: list[Any] = []
    infos: list[Any] = []
    info_topic = raw.rpartition("/")[0] + "/camera_info"
    held = [
        node.create_subscription(
            CompressedImage if compressed else Image, topic, images.append, qos
        ),
        node.create_subscription(CameraInfo, info_topic, infos.append, qos),
    ]
    end = time.monotonic() + options.wait
    while not (images and infos) and time.monotonic() < end:
        rclpy.spin_once(node, timeout_sec=0.05)
    for subscription in held:
        node.destroy_subscription(subscription)
    who = ", ".join(_who(publisher) for publisher in publishers)
    if not images:
        yield Line(
            "camera",
            FAIL,
            f"{who} publishes {topic}, and the QoS fits, but no image came in {options.wait:.0f} s",
            "is the camera on, or paused? In containers: share /dev/shm (--ipc=host)",
        )
        return
    yield from _picture(topic, images[-1], who)
    yield _intrinsics(info_topic, infos, images[-1])


def _publishers(node: Any, topic: str, wait: float) -> list[Any]:
    """Those heard of within so many seconds, names included, which come a little later."""
    end = time.monotonic() + wait
    settled = math.inf
    while True:
        found: list[Any] = node.get_publishers_info_by_topic(topic)
        now = time.monotonic()
        if found and settled == math.inf:
            settled = now + 0.3  # for others, too
        if now > end or (now > settled and not any(_UNKNOWN in p.node_name for p in found)):
            return found
        time.sleep(0.05)


def _nobody(node: Any, topic: str, options: Options) -> Line:
    others = sorted(
        name
        for name, kinds in node.get_topic_names_and_types()
        if any(
            kind in ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage") for kind in kinds
        )
        and node.count_publishers(name)
    )
    nodes = sorted({name for name, _ in node.get_node_names_and_namespaces()} - {"doctor"})
    text = f"nobody publishes {topic}"
    mend = "start it: waste-seg up, or your camera's driver; is its ROS_DOMAIN_ID the same?"
    if others:
        text += f"; there are images on {', '.join(others)}"
        mend = f"use that topic: image_topic:={others[0]} (here: --image-topic {others[0]})"
    elif nodes:
        text += f"; nodes there are: {', '.join(nodes)}"
    return Line("camera", FAIL if options.camera else WARN, text, mend)


def _who(endpoint: Any) -> str:
    if _UNKNOWN in endpoint.node_name:
        return "a node without a name"
    return f"{endpoint.node_namespace.rstrip('/')}/{endpoint.node_name}"


def _segmenter_qos(topic: str, options: Options) -> tuple[Any, bool]:
    """The QoS with which the segmenter will subscribe, and whether parameters have changed it."""
    from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

    from waste_seg_ros.replay import segmenter_parameters

    values = segmenter_parameters(options.params_file)
    qos = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    # Parameter files may write the names with dots or as nested mappings.
    nested = values.get("qos_overrides", {})
    nested = nested.get(topic, {}).get("subscription", {}) if isinstance(nested, dict) else {}
    changed = False
    for name, policy in (("reliability", ReliabilityPolicy), ("durability", DurabilityPolicy)):
        wanted = values.get(f"qos_overrides.{topic}.subscription.{name}", nested.get(name))
        if wanted:
            setattr(qos, name, policy.get_from_short_key(str(wanted)))
            changed = True
    return qos, changed


def _mismatches(
    node: Any, topic: str, publishers: Sequence[Any], qos: Any, overridden: bool
) -> Iterator[Line]:
    """Publishers and subscribers of the topic, of ours and of those there, that do not fit."""
    from rclpy.qos import QoSCompatibility, qos_check_compatible

    ours = "the segmenter" + (" with its qos_overrides" if overridden else "")
    listeners = [(ours, qos)]
    listeners += [(_who(s), s.qos_profile) for s in node.get_subscriptions_info_by_topic(topic)]
    for publisher in publishers:
        for name, asked in listeners:
            match, reason = qos_check_compatible(publisher.qos_profile, asked)
            if match != QoSCompatibility.ERROR:
                continue
            policies = policy_differences(publisher.qos_profile, asked)
            lower = policies[0].partition(" ")[0] if policies else "reliability"
            who = "the segmenter" if name == ours else name
            mend = f"change it in the camera's driver, or set {who}'s parameter "
            mend += f"qos_overrides.{topic}.subscription.{lower}"
            yield Line(
                "QoS",
                FAIL if name == ours else WARN,
                f"{_who(publisher)} and {name} do not fit on {topic}: "
                + ("; ".join(policies) or reason),
                mend,
            )


def policy_differences(offered: Any, requested: Any) -> list[str]:
    """Policies by which a publisher's profile is too little for a subscriber's."""
    from rclpy.qos import DurabilityPolicy, ReliabilityPolicy

    strong = {
        "reliability": ReliabilityPolicy.RELIABLE,
        "durability": DurabilityPolicy.TRANSIENT_LOCAL,
    }
    found = []
    for policy, best in strong.items():
        offer, wish = getattr(offered, policy), getattr(requested, policy)
        if wish == best and offer != best:
            found.append(f"{policy} {offer.short_key} is offered, {wish.short_key} asked for")
    if not found and offered.deadline != requested.deadline:
        found.append(f"deadline {offered.deadline} is offered, {requested.deadline} asked for")
    return found


def _picture(topic: str, message: Any, who: str) -> Iterator[Line]:
    from rclpy.clock import Clock
    from rclpy.time import Time

    from waste_seg_ros.nodes.images import ImageError, to_rgb

    try:
        height, width = to_rgb(message).shape[:2]
    except ImageError as error:
        yield Line("camera", FAIL, f"{topic}: {error}", "see there")
        return
    kind = getattr(message, "encoding", "") or getattr(message, "format", "")
    yield Line("camera", OK, f"{who} publishes {topic}: {width}x{height} {kind}")
    stamp = Time.from_msg(message.header.stamp).nanoseconds
    age = (Clock().now().nanoseconds - stamp) * 1e-9
    if not stamp:
        yield Line("stamps", WARN, f"{topic} has none", "let the driver set header.stamp")
    elif not -0.1 < age < 5.0:
        yield Line(
            "stamps",
            WARN,
            f"an image of {topic} is {age:.1f} s old by this machine's clock",
            "set the clocks of both machines (chrony); for a recording: use_sim_time and "
            "waste-seg replay --clock",
        )
    if not message.header.frame_id:
        yield Line("frame", WARN, f"{topic} has no frame_id", "let the driver set it")


def _intrinsics(topic: str, infos: Sequence[Any], image: Any) -> Line:
    mend = "calibrate the camera (ros2 run camera_calibration, or waste-seg calibrate)"
    if not infos:
        return Line("camera_info", WARN, f"none on {topic}: positions are guessed", mend)
    info = infos[-1]
    if info.k[0] <= 0 or info.k[4] <= 0:
        return Line("camera_info", WARN, f"{topic} has no K: positions are guessed", mend)
    size = (info.width, info.height)
    if hasattr(image, "width"):
        mine = (image.width, image.height)
        if abs(size[0] * mine[1] - size[1] * mine[0]) > 0.01 * size[0] * mine[1]:
            return Line(
                "camera_info",
                WARN,
                f"{topic} is of {size[0]}x{size[1]}, the image of {mine[0]}x{mine[1]}: another "
                "shape",
                "calibrate at the size that the camera sends",
            )
    text = f"{topic}: focal length {info.k[0]:.0f} px at {size[0]}x{size[1]}"
    return Line("camera_info", OK, text)


def check_calibration(options: Options) -> Iterator[Line]:
    """The file of ``waste-seg calibrate``."""
    from waste_seg_ros.perception.belt import BeltError, read_calibration

    if not options.calibration:
        yield Line(
            "calibration",
            WARN,
            "no file given: positions are of a plane at belt_distance",
            "waste-seg calibrate, then waste-seg doctor --calibration FILE",
        )
        return
    try:
        found = read_calibration(Path(options.calibration).expanduser())
    except (BeltError, OSError) as error:
        yield Line("calibration", FAIL, str(error), "waste-seg calibrate writes a new one")
        return
    millimetres = 1e3 * found.plane.error_m
    width, height = found.camera.size
    text = f"{options.calibration}: {width}x{height}, error on the belt {millimetres:.1f} mm"
    if millimetres > 5:
        yield Line("calibration", WARN, text, "calibrate anew with more and sharper views")
    else:
        yield Line("calibration", OK, text)


def check_model(options: Options) -> Iterator[Line]:
    """The bundle's files against their hashes, and an inference on each backend."""
    from waste_seg_ros.runtime.backends import Backend, load_backend
    from waste_seg_ros.runtime.bundle import BundleError, open_bundle

    try:
        bundle = open_bundle(options.model)
    except (BundleError, OSError) as error:
        yield Line("model", FAIL, str(error), "waste-seg models lists those there are")
        return
    digests = sorted(bundle.manifest.files.items())
    sums = ", ".join(f"{name} {digest[:8]}" for name, digest in digests)
    yield Line("model", OK, f"{bundle.manifest.name} ({bundle.manifest.head}): {sums}")

    width, height = bundle.manifest.input_size
    shade = np.linspace(0, 255, width, dtype=np.uint8)
    image = np.broadcast_to(shade[None, :, None], (height, width, 3)).copy()
    first: tuple[str, np.ndarray] | None = None
    worked = 0
    for kind in options.backends:
        name = f"backend {kind}"
        if importlib.util.find_spec(kind) is None:
            needed = kind == AUTO_ORDER[0]
            text = "not installed"
            text += ": the fastest one" if needed else ", which is fine"
            mend = f"pip install {kind}" if needed else ""
            yield Line(name, WARN if needed else OK, text, mend)
            continue
        try:
            backend: Backend = load_backend(bundle, kind)
            backend.predict(image)
            begin = time.perf_counter()
            labels = backend.predict(image).labels
            seconds = time.perf_counter() - begin
        except Exception as error:  # runtimes raise errors of their own
            text = _last_line(str(error)) if str(error) else type(error).__name__
            yield Line(name, WARN, f"does not run: {text}", f"pip install --upgrade {kind}")
            continue
        worked += 1
        text = f"{1e3 * seconds:.0f} ms at {width}x{height}"
        if first is None:
            first = (kind, labels)
        else:
            same = float((labels == first[1]).mean())
            text += f", {same:.1%} of pixels as {first[0]}"
            if same < 0.99:
                yield Line(name, WARN, text, "name one in the parameter backend; tell us of it")
                continue
        yield Line(name, OK, text)
    if not worked:
        yield Line("backends", FAIL, "no backend runs the model", "pip install openvino")


# --- command line ---------------------------------------------------------------------------------

CHECKS: tuple[tuple[str, Callable[[Options], Iterator[Line]]], ...] = (
    ("python", check_python),
    ("threads", check_threads),
    ("disk", check_disk),
    ("gpu", check_gpu),
    ("memory", check_shared_memory),
    ("ros", check_ros),
    ("network", check_network),
    ("camera", check_camera),
    ("calibration", check_calibration),
    ("model", check_model),
)


def examine(
    options: Options,
    names: Sequence[str] = (),
    tell: Callable[[Line], None] = lambda line: None,
) -> list[Line]:
    """Run the checks, all or those named; `tell` hears of each line as it comes."""
    lines: list[Line] = []
    for name, check in CHECKS:
        if names and name not in names:
            continue
        try:
            for line in check(options):
                lines.append(line)
                tell(line)
        except Exception as error:  # a check that breaks must not hide what the others find
            line = Line(
                name,
                FAIL,
                f"the check itself broke: {type(error).__name__}: {error}",
                "please report this line",
            )
            lines.append(line)
            tell(line)
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``waste-seg doctor``."""
    parser.add_argument("--model", default="", help="bundle to try; default: the segmenter's")
    parser.add_argument(
        "--backend", choices=AUTO_ORDER, help="try the model on this one only, not on all"
    )
    parser.add_argument("--calibration", default="", metavar="FILE", help="of waste-seg calibrate")
    parser.add_argument("--namespace", default="", help="of the nodes, e.g. 'line1'")
    parser.add_argument("--image-topic", default="image_raw", metavar="TOPIC")
    parser.add_argument("--image-transport", default="raw", choices=("raw", "compressed"))
    parser.add_argument(
        "--params-file", type=Path, metavar="YAML", help="the segmenter's parameters"
    )
    parser.add_argument(
        "--camera", action="store_true", help="a camera must be there: FAIL where there is none"
    )
    parser.add_argument(
        "--wait", type=float, default=3.0, metavar="S", help="for the camera, and for an image"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("."), help="where recordings go: its disk is looked at"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[name for name, _ in CHECKS],
        default=[],
        metavar="CHECK",
        help=f"only these: {', '.join(name for name, _ in CHECKS)}",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="the lines as JSON: to a file, or alone",
    )


def run(args: argparse.Namespace) -> int:
    """Run ``waste-seg doctor``; 1 where something will not work."""
    from waste_seg_ros.record import RecordingError
    from waste_seg_ros.replay import segmenter_parameters

    try:
        values = segmenter_parameters(args.params_file)
    except RecordingError as error:
        print(f"waste-seg doctor: {error}", file=sys.stderr)
        return 1
    options = Options(
        model=args.model or str(values["model"]),
        backends=(args.backend,) if args.backend else AUTO_ORDER,
        calibration=args.calibration,
        namespace=args.namespace,
        image_topic=args.image_topic,
        image_transport=args.image_transport,
        params_file=args.params_file,
        folder=args.folder,
        wait=args.wait,
        camera=args.camera,
    )
    alone = args.json == "-"
    lines = examine(options, args.only, (lambda line: None) if alone else print_line)
    counts = {level: sum(line.level == level for line in lines) for level in (OK, WARN, FAIL)}
    report = {"healthy": not counts[FAIL], "counts": counts, "lines": [asdict(x) for x in lines]}
    if alone:
        print(json.dumps(report, indent=2))
    else:
        if args.json:
            write_json(Path(args.json), report)
        print(", ".join(f"{number} {level}" for level, number in counts.items()))
    return 1 if counts[FAIL] else 0


def print_line(line: Line) -> None:
    """Print a line, and its mend below it."""
    level = f"{line.level:4s}"
    if sys.stdout.isatty():
        colour = {OK: 32, WARN: 33, FAIL: 31}[line.level]
        level = f"\x1b[{colour}m{level}\x1b[0m"
    print(f"{level}  {line.name}: {line.text}", flush=True)
    if line.mend:
        print(f"      -> {line.mend}", flush=True)
