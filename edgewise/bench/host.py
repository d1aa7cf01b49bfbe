"""What is known of this machine. What cannot be found out is None, on every system."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from edgewise.bench.record import Host


def describe() -> Host:
    """Describe this machine from `/proc` and `/sys`; on other systems most of it is None."""
    cpuinfo = text("/proc/cpuinfo") or ""
    return Host(
        device=text("/proc/device-tree/model") or text("/sys/class/dmi/id/product_name") or android("ro.product.model"),
        cpu=cpu_name(cpuinfo),
        cores_physical=physical_cores(cpuinfo),
        cores_logical=_usable_cores(),
        memory_bytes=memory(text("/proc/meminfo") or ""),
        os=_os(),
        kernel=f"{platform.system()} {platform.release()}".strip() or None,
        python=platform.python_version(),
        governor=text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        load_average=load_average(),
        driver=None,
        power_mode=text("/sys/firmware/acpi/platform_profile"),
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
    status = text("/proc/self/status") or ""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    if found:
        return int(found.group(1)) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def busy_seconds() -> float | None:
    """Seconds that all cores together were busy since the start of the system, from `/proc/stat`."""
    found = re.match(r"cpu\s+([\d ]+)", text("/proc/stat") or "")
    if not found:
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; what guests took is in user already.
    ticks = [int(word) for word in found.group(1).split()][:8]
    return (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK")


def _usable_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _os() -> str | None:
    release = text("/etc/os-release") or ""
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)"?$', release, re.MULTILINE)
    if not found and (version := android("ro.build.version.release")):
        return f"Android {version}"
    return found.group(1) if found else platform.platform() or None


def android(name: str) -> str | None:
    """A property of an Android system; None on all others."""
    if (program := shutil.which("getprop")) is None:
        return None
    try:
        done = subprocess.run([program, name], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return done.stdout.strip() or None


def text(path: str | Path) -> str | None:
    """The text of a small file, or None if it is not there, not readable, or empty."""
    try:
        found = Path(path).read_text("utf-8", errors="replace")
    except OSError:
        return None
    return found.strip("\0\n ") or None
