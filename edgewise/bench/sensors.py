"""Power, temperature and throttling, from what the system shows of them. What it does not show has a reason instead.

The files are those of the Linux kernel: `powercap` (RAPL), `hwmon` (the INA monitors of a Jetson too), `power_supply`,
`thermal`, `thermal_throttle`. On macOS `powermetrics` tells the power to root.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from edgewise.bench.host import text

ROOT = Path("/")
_LEAST_PAUSE = 0.02
"""Seconds between two readings for the same artifact: a monitor on a slow bus would take longer than the model."""


@dataclass(frozen=True)
class PowerSensor:
    """`read()` gives watts now, or with `counts` joules since some moment; None if it cannot be read now."""

    source: str
    read: Callable[[], float | None]
    counts: bool = False
    close: Callable[[], None] = lambda: None


class Power:
    """Mean power of one artifact over its runs. Call `before` and `after` each run; without a sensor both do nothing."""

    def __init__(self, sensor: PowerSensor | None) -> None:
        self._sensor = sensor
        self._joules = self._seconds = 0.0
        self._start = self._last = float("-inf")
        self._counter: float | None = None

    def before(self) -> None:
        if self._sensor is None:
            return
        if self._sensor.counts:
            self._counter = self._sensor.read()
        self._start = time.perf_counter()

    def after(self) -> None:
        if self._sensor is None:
            return
        now = time.perf_counter()
        spent = now - self._start
        if self._sensor.counts:
            end = self._sensor.read()
            spent = time.perf_counter() - self._start
            if end is not None and self._counter is not None:
                self._add(end - self._counter, spent)
        elif now - self._last >= _LEAST_PAUSE:
            watts = self._sensor.read()
            self._last = now
            if watts is not None:
                self._add(watts * spent, spent)

    def _add(self, joules: float, seconds: float) -> None:
        self._joules += joules
        self._seconds += seconds

    @property
    def watts(self) -> float | None:
        return self._joules / self._seconds if self._seconds > 0 else None


def power(root: Path = ROOT) -> tuple[PowerSensor | None, str | None]:
    """The best sensor of the whole machine's power that can be read, or None and why there is none."""
    reasons = []
    for find in (_ina, _ina_of_old, _rapl, _hwmon, _battery):
        sensor, reason = find(root)
        if sensor is not None:
            return sensor, None
        reasons += [reason] if reason else []
    if platform.system() == "Darwin":
        return _powermetrics()
    return None, "; ".join(
        reasons
    ) or "the system shows no RAPL counter, no power monitor and no battery that discharges"


def _ina(root: Path) -> tuple[PowerSensor | None, str | None]:
    """INA3221 on a Jetson: volts times amperes of the rail that feeds all others, or the sum of the rails."""
    rails = {}
    for monitor in sorted(root.glob("sys/class/hwmon/hwmon*")):
        if text(monitor / "name") not in ("ina3221", "ina3221x", "ina226", "ina219", "ina230", "ina238"):
            continue
        for amperes in sorted(monitor.glob("curr*_input")):
            number = amperes.name[4:-6]
            volts = monitor / f"in{number}_input"
            label = text(monitor / f"in{number}_label") or f"rail {number}"
            if volts.exists() and "sum of shunt" not in label:
                rails[f"{monitor.name} {label}"] = (volts, amperes)
    if not rails:
        return None, None
    chosen = {name: pair for name, pair in rails.items() if name.split(" ", 1)[1] in ("VDD_IN", "POM_5V_IN")} or rails

    def read() -> float | None:
        values = [(_number(volts), _number(amperes)) for volts, amperes in chosen.values()]
        known = [v * a / 1e6 for v, a in values if v is not None and a is not None]
        return sum(known) if len(known) == len(values) else None

    return _tried(PowerSensor("INA monitor: " + ", ".join(chosen), read), next(iter(chosen.values()))[1])


def _ina_of_old(root: Path) -> tuple[PowerSensor | None, str | None]:
    """INA3221 before JetPack 5: milliwatts below `iio:device`."""
    rails = {
        text(file.with_name(f"rail_name_{file.name[8:-6]}")) or file.name: file
        for file in sorted(root.glob("sys/bus/i2c/drivers/ina3221x/*/iio:device*/in_power*_input"))
    }
    if not rails:
        return None, None
    chosen = {name: file for name, file in rails.items() if name in ("VDD_IN", "POM_5V_IN")} or rails
    return _tried(
        PowerSensor("INA monitor: " + ", ".join(chosen), _sum(chosen.values(), 1e-3)), next(iter(chosen.values()))
    )


def _rapl(root: Path) -> tuple[PowerSensor | None, str | None]:
    """Energy counters of Intel and AMD processors: the platform (`psys`) where there is one, else all packages."""
    zones = {}
    for zone in sorted(root.glob("sys/class/powercap/intel-rapl:*")):
        if zone.name.count(":") == 1:
            zones[zone] = text(zone / "name") or zone.name
    if not zones:
        return None, None
    chosen = [zone for zone, name in zones.items() if name == "psys"][:1] or list(zones)
    ranges = [_number(zone / "max_energy_range_uj") for zone in chosen]
    # The sum of two counters does not wrap at one place: each is unrolled by itself.
    counters = [_Unrolled(zone / "energy_uj", wraps) for zone, wraps in zip(chosen, ranges, strict=True)]

    def read() -> float | None:
        values = [counter() for counter in counters]
        known = [value for value in values if value is not None]
        return sum(known) / 1e6 if len(known) == len(values) else None

    source = "RAPL: " + ", ".join(zones[zone] for zone in chosen)
    return _tried(PowerSensor(source, read, counts=True), chosen[0] / "energy_uj")


class _Unrolled:
    """A counter that begins anew at some number, as one that goes on."""

    def __init__(self, file: Path, wraps: float | None) -> None:
        self._file, self._wraps = file, wraps
        self._last: float | None = None
        self._base = 0.0

    def __call__(self) -> float | None:
        value = _number(self._file)
        if value is None:
            return None
        if self._last is not None and value < self._last:
            if self._wraps is None:
                return None
            self._base += self._wraps
        self._last = value
        return self._base + value


def _hwmon(root: Path) -> tuple[PowerSensor | None, str | None]:
    """Other monitors that tell microwatts: boards, power supplies, graphics cards."""
    files = {
        f"{text(file.parent / 'name') or file.parent.name} {file.name}": file
        for pattern in ("power*_input", "power*_average")
        for file in sorted(root.glob(f"sys/class/hwmon/hwmon*/{pattern}"))
    }
    for name, file in files.items():
        found = _tried(PowerSensor(f"hwmon: {name}", _sum([file], 1e-6)), file)
        if found[0] is not None:
            return found
    return None, None


def _battery(root: Path) -> tuple[PowerSensor | None, str | None]:
    """A battery tells what it gives, as long as no charger is connected."""
    for supply in sorted(root.glob("sys/class/power_supply/*")):
        if text(supply / "type") == "Battery":
            if text(supply / "status") != "Discharging":
                return None, "the battery is not discharging, so that it does not show what the machine takes"
            if (supply / "power_now").exists():
                return _tried(
                    PowerSensor(f"battery {supply.name}", _sum([supply / "power_now"], 1e-6)), supply / "power_now"
                )
            volts, amperes = supply / "voltage_now", supply / "current_now"

            def read(volts: Path = volts, amperes: Path = amperes) -> float | None:
                v, a = _number(volts), _number(amperes)
                return None if v is None or a is None else abs(v * a) / 1e12

            return _tried(PowerSensor(f"battery {supply.name}", read), amperes)
    return None, None


_SAMPLE = re.compile(r"^Combined Power \(CPU \+ GPU \+ ANE\): (\d+) mW$", re.MULTILINE)


def _powermetrics() -> tuple[PowerSensor | None, str | None]:
    """What macOS tells root of the CPU, GPU and Neural Engine together, every 200 ms."""
    program = shutil.which("powermetrics")
    if program is None:
        return None, "there is no powermetrics on this system"
    if os.geteuid() != 0:
        return None, "powermetrics tells the power to root only"
    out = tempfile.TemporaryFile()  # noqa: SIM115 - it is open for as long as the sensor
    command = [program, "--samplers", "cpu_power,gpu_power,ane_power", "-i", "200"]
    running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.DEVNULL)

    def read() -> float | None:
        end = os.fstat(out.fileno()).st_size
        return last_sample(os.pread(out.fileno(), 1 << 16, max(0, end - (1 << 16))).decode("utf-8", "replace"))

    def close() -> None:
        running.terminate()
        running.wait()
        out.close()

    return PowerSensor("powermetrics", read, close=close), None


def last_sample(printed: str) -> float | None:
    """The last power, in watts, in what `powermetrics` printed."""
    found = _SAMPLE.findall(printed)
    return int(found[-1]) / 1e3 if found else None


def temperature(root: Path = ROOT) -> tuple[float, str] | None:
    """The hottest thermal zone or monitor in degrees Celsius, and its name; None if none can be read."""
    found = []
    for file in (*root.glob("sys/class/thermal/thermal_zone*/temp"), *root.glob("sys/class/hwmon/hwmon*/temp*_input")):
        degrees = _number(file)
        # Zones that are off say 0 or below, and broken ones the end of their range.
        if degrees is not None and 0 < degrees < 150_000:
            name = text(file.with_name("type")) or text(file.with_name("name")) or file.parent.name
            found.append((degrees / 1000, f"{file.parent.name} {name}"))
    return max(found, default=None)


def throttle_counts(root: Path = ROOT) -> dict[str, float]:
    """What counts up, or goes up, when the system slows itself down: for `throttling`."""
    counts = {}
    for file in root.glob("sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count"):
        value = _number(file)
        if value is not None:
            counts[f"{file.parent.parent.name} {file.name.removesuffix('_throttle_count')}"] = value
    for file in root.glob("sys/class/thermal/cooling_device*/cur_state"):
        kind, value = text(file.with_name("type")) or "", _number(file)
        if value is not None and re.search(r"cpu|gpu|processor|devfreq", kind, re.IGNORECASE):
            counts[f"cooling of {kind} ({file.parent.name})"] = value
    flags = text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    if flags is not None and re.fullmatch(r"(0x)?[0-9a-fA-F]+", flags):
        for bit, meaning in ((0, "under-voltage"), (1, "a capped frequency"), (2, "throttling")):
            counts[f"the firmware's flag of {meaning}"] = float(int(flags, 16) >> bit & 1)
    return counts


def throttling(before: dict[str, float], after: dict[str, float]) -> tuple[str, ...] | None:
    """What slowed down in between, or was slow at the end. None: this system does not tell."""
    if not after:
        return None
    signs = []
    for name, value in sorted(after.items()):
        lasts = not name.startswith("cpu")
        if value > before.get(name, 0.0) or (lasts and value > 0):
            signs.append(name)
    if len(signs) > 3:
        signs[2:] = [f"and {len(signs) - 2} more"]
    return tuple(signs)


def _tried(sensor: PowerSensor, file: Path) -> tuple[PowerSensor | None, str | None]:
    """The sensor if it can be read now, else the reason."""
    if sensor.read() is not None:
        return sensor, None
    if file.exists() and not os.access(file, os.R_OK):
        return None, f"{sensor.source} may be read by root only"
    return None, f"{sensor.source} cannot be read"


def _sum(files: Iterable[Path], scale: float) -> Callable[[], float | None]:
    paths = list(files)

    def read() -> float | None:
        values = [_number(path) for path in paths]
        known = [value for value in values if value is not None]
        return sum(known) * scale if len(known) == len(values) else None

    return read


def _number(path: Path) -> float | None:
    found = text(path)
    return float(found) if found is not None and re.fullmatch(r"-?\d{1,18}", found) else None
