"""Sensors as files of the kernel's layout, in a folder of the test's own; and those of this machine, whatever it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgewise.bench import sensors


def write(root: Path, files: dict[str, object]) -> None:
    for name, value in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")


RAPL = "sys/class/powercap/intel-rapl:"


def test_rapl_counts_every_package_and_no_part_twice(tmp_path: Path) -> None:
    for number, energy in enumerate((5_000_000, 7_000_000)):
        zone = f"{RAPL}{number}"
        write(
            tmp_path,
            {
                f"{zone}/name": f"package-{number}",
                f"{zone}/energy_uj": energy,
                f"{zone}/max_energy_range_uj": 9_000_000,
            },
        )
    write(tmp_path, {f"{RAPL}0:0/name": "core", f"{RAPL}0:0/energy_uj": 1_000_000})
    sensor, reason = sensors.power(tmp_path)
    assert sensor is not None and reason is None and sensor.counts
    assert sensor.source == "RAPL: package-0, package-1" and sensor.read() == 12.0
    # The second counter comes to the end of its range, and begins anew.
    write(tmp_path, {f"{RAPL}0/energy_uj": 6_000_000, f"{RAPL}1/energy_uj": 500_000})
    assert sensor.read() == pytest.approx(6 + 9.5)


def test_rapl_of_the_platform_holds_the_packages(tmp_path: Path) -> None:
    for number, (name, energy) in enumerate((("package-0", 5_000_000), ("psys", 20_000_000))):
        write(tmp_path, {f"{RAPL}{number}/name": name, f"{RAPL}{number}/energy_uj": energy})
    sensor, _ = sensors.power(tmp_path)
    assert sensor is not None and sensor.source == "RAPL: psys" and sensor.read() == 20.0


def test_mean_power_from_a_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {f"{RAPL}0/name": "package-0", f"{RAPL}0/energy_uj": 0})
    sensor, _ = sensors.power(tmp_path)
    clock = iter([0.0, 0.9, 1.0, 10.0, 10.9, 11.0])
    monkeypatch.setattr(sensors.time, "perf_counter", lambda: next(clock))
    power = sensors.Power(sensor)
    assert power.watts is None
    for energy in (5_000_000, 12_000_000):  # 5 J in one second, then 7 J in another
        power.before()
        write(tmp_path, {f"{RAPL}0/energy_uj": energy})
        power.after()
    assert power.watts == pytest.approx(6.0)


JETSON = "sys/class/hwmon/hwmon3/"


def test_the_monitor_of_a_jetson(tmp_path: Path) -> None:
    rails = {1: ("VDD_IN", 5000, 2000), 2: ("VDD_CPU_GPU_CV", 5000, 800), 3: ("VDD_SOC", 5000, 500)}
    write(tmp_path, {f"{JETSON}name": "ina3221"})
    for number, (label, millivolts, milliamperes) in rails.items():
        write(
            tmp_path,
            {
                f"{JETSON}in{number}_label": label,
                f"{JETSON}in{number}_input": millivolts,
                f"{JETSON}curr{number}_input": milliamperes,
            },
        )
    sensor, _ = sensors.power(tmp_path)
    assert sensor is not None and not sensor.counts and "VDD_IN" in sensor.source and "SOC" not in sensor.source
    assert sensor.read() == pytest.approx(10.0)
    (tmp_path / f"{JETSON}in1_label").write_text("VDD_GPU_SOC\n")  # no rail that feeds the others: all are summed
    sensor, _ = sensors.power(tmp_path)
    assert sensor is not None and sensor.read() == pytest.approx(10 + 4 + 2.5)


def test_the_monitor_of_an_old_jetson(tmp_path: Path) -> None:
    device = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/"
    write(tmp_path, {f"{device}rail_name_0": "POM_5V_IN", f"{device}in_power0_input": 4321})
    write(tmp_path, {f"{device}rail_name_1": "POM_5V_GPU", f"{device}in_power1_input": 1000})
    sensor, _ = sensors.power(tmp_path)
    assert sensor is not None and sensor.read() == pytest.approx(4.321)


def test_other_monitors_and_batteries(tmp_path: Path) -> None:
    write(tmp_path, {"sys/class/hwmon/hwmon0/name": "board", "sys/class/hwmon/hwmon0/power1_input": 2_500_000})
    sensor, _ = sensors.power(tmp_path)
    assert sensor is not None and sensor.source == "hwmon: board power1_input" and sensor.read() == 2.5
    battery = "sys/class/power_supply/BAT0/"
    charged, other = tmp_path / "charged", tmp_path / "other"
    write(charged, {f"{battery}type": "Battery", f"{battery}status": "Full", f"{battery}power_now": 0})
    sensor, reason = sensors.power(charged)
    assert sensor is None and reason is not None and "not discharging" in reason
    write(other, {f"{battery}type": "Battery", f"{battery}status": "Discharging"})
    write(other, {f"{battery}voltage_now": 12_000_000, f"{battery}current_now": -500_000})
    sensor, _ = sensors.power(other)
    assert sensor is not None and sensor.read() == pytest.approx(6.0)


def test_no_sensor_has_a_reason(tmp_path: Path) -> None:
    sensor, reason = sensors.power(tmp_path)
    assert sensor is None and reason
    power = sensors.Power(sensor)
    power.before()
    power.after()
    assert power.watts is None
    assert sensors.temperature(tmp_path) is None
    assert sensors.throttling({}, sensors.throttle_counts(tmp_path)) is None


@pytest.mark.parametrize("content", ["", "x", "1e9", "9" * 400, "\0", "-"])
def test_files_that_hold_no_number(tmp_path: Path, content: str) -> None:
    write(tmp_path, {f"{RAPL}0/name": "package-0", f"{RAPL}0/energy_uj": content})
    write(tmp_path, {"sys/class/thermal/thermal_zone0/temp": content})
    sensor, reason = sensors.power(tmp_path)
    assert sensor is None and reason is not None and "cannot be read" in reason
    assert sensors.temperature(tmp_path) is None


def test_temperature_is_the_hottest(tmp_path: Path) -> None:
    write(tmp_path, {"sys/class/thermal/thermal_zone0/temp": 41000, "sys/class/thermal/thermal_zone0/type": "acpitz"})
    write(tmp_path, {"sys/class/thermal/thermal_zone1/temp": -256000})
    write(tmp_path, {"sys/class/hwmon/hwmon1/temp1_input": 67500, "sys/class/hwmon/hwmon1/name": "coretemp"})
    assert sensors.temperature(tmp_path) == (67.5, "hwmon1 coretemp")


def test_signs_of_throttling(tmp_path: Path) -> None:
    count = "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count"
    cooling, flags = "sys/class/thermal/cooling_device0/", "sys/devices/platform/soc/soc:firmware/get_throttled"
    write(tmp_path, {count: 7, f"{cooling}type": "Processor", f"{cooling}cur_state": 0, flags: "50000"})
    before = sensors.throttle_counts(tmp_path)
    # A count of the past and flags of the past (bits 16 and up) are no throttling now.
    assert sensors.throttling(before, sensors.throttle_counts(tmp_path)) == ()
    write(tmp_path, {count: 9, f"{cooling}cur_state": 2, flags: "0x50005"})
    signs = sensors.throttling(before, sensors.throttle_counts(tmp_path))
    assert signs is not None and signs[0] == "cooling of Processor (cooling_device0)" and "and 2 more" in signs[-1]
    write(tmp_path, {f"{cooling}cur_state": 0, flags: "0"})
    assert sensors.throttling(before, sensors.throttle_counts(tmp_path)) == ("cpu0 package",)


def test_what_powermetrics_prints() -> None:
    printed = (
        "CPU Power: 120 mW\nCombined Power (CPU + GPU + ANE): 130 mW\n\nCombined Power (CPU + GPU + ANE): 1250 mW\nGPU"
    )
    assert sensors.last_sample(printed) == 1.25
    assert sensors.last_sample("Combined Power (CPU + GPU + ANE): 12") is None


def test_this_machine() -> None:
    sensor, reason = sensors.power()
    assert (sensor is None) == (reason is not None)
    if sensor is not None:
        assert sensor.read() is not None
        sensor.close()
    hot = sensors.temperature()
    assert hot is None or -50 < hot[0] < 150
