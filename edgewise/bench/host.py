"""What is known of this machine. What cannot be found out is None, on every system."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from edgewise.bench.record import Host


def describe() -> Host:
    """Describe this machine from `/proc` and `/sys`; on other systems most of it is None."""
    cpuinfo = _text("/proc/cpuinfo") or ""
    return Host(
        device=_text("/proc/device-tree/model") or _text("/sys/class/dmi/id/product_name"),
        cpu=cpu_name(cpuinfo),
        cores_physical=physical_cores(cpuinfo),
        cores_logical=_usable_cores(),
        memory_bytes=memory(_text("/proc/meminfo") or ""),
        os=_os(),
        kernel=f"{platform.system()} {platform.release()}".strip() or None,
        python=platform.python_version(),
        governor=_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        load_average=load_average(),
        driver=None,
        power_mode=_text("/sys/firmware/acpi/platform_profile"),
    )


def cpu_name(cpuinfo: str) -> str | None:
    """The name of the CPU in the text of `/proc/cpuinfo`. ARM gives a name on some boards only."""
    for key in ("model name", "Model", "Hardware", "cpu model"):
        found = re.search(rf"^{key}\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or None


def physical_cores(cpuinfo: str) -> int | None:
    """Number of different cores in the text of `/proc/cpuinfo`; None where it does not tell them apart."""
    cores = set()
    for block in cpuinfo.split("\n\n"):
        package = re.search(r"^physical id\s*:\s*(\d+)$", block, re.MULTILINE)
        core = re.search(r"^core id\s*:\s*(\d+)$", block, re.MULTILINE)
        if core:
            cores.add((package.group(1) if package else "0", core.group(1)))
    return len(cores) or None


def memory(meminfo: str) -> int | None:
    """Total memory in bytes from the text of `/proc/meminfo`."""
    found = re.search(r"^MemTotal:\s*(\d+) kB$", meminfo, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def load_average() -> float | None:
    """Average number of runnable tasks over the last minute."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):  # Windows has none
        return None


def peak_memory() -> int | None:
    """Peak resident memory of this process so far, in bytes."""
    status = _text("/proc/self/status") or ""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    if found:
        return int(found.group(1)) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def temperature() -> float | None:
    """The hottest thermal zone in degrees Celsius, or None if there is no zone that can be read."""
    degrees = []
    for zone in sorted(Path("/sys/class/thermal").glob("thermal_zone*/temp")):
        text = _text(str(zone))
        if text is not None and re.fullmatch(r"-?\d+", text):
            degrees.append(int(text) / 1000)
    return max(degrees) if degrees else None


def _usable_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _os() -> str | None:
    release = _text("/etc/os-release") or ""
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)"?$', release, re.MULTILINE)
    return found.group(1) if found else platform.platform() or None


def _text(path: str) -> str | None:
    """The text of a small file, or None if it is not there, not readable, or empty."""
    try:
        text = Path(path).read_text(errors="replace")
    except OSError:
        return None
    return text.strip("\0\n ") or None
