"""Print, as the last line of a test run, the tests skipped for a missing tool and how to run them.

Such a test skips with the reason ``needs <tool>``, or ``needs <tool>: <how to get it>``. With ``DINOV2_SKIPPED`` in the
environment, the names of all tests that were skipped are added to that file, for ``pytest @FILE``.
"""

import ctypes
import os
import re
import signal
from collections import Counter

import pytest


def pytest_configure():
    """Restore SIGINT, which is ignored in a background job of a script, so that tests can send Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_make_parametrize_id(val, argname):
    """Name long values by their argument: every process stores and sends all names, and values reached 73 MB."""
    is_long = len(val) > 100 if isinstance(val, str | bytes) else isinstance(val, int) and abs(val) >= 10**100
    return argname if is_long else None


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the markers
def pytest_collection_modifyitems(items):
    """Group the tests of a file that share a fixture of the file in one process of pytest-xdist (``--dist loadgroup``).

    Otherwise each process would create the fixture, usually a training run.
    """
    for item in items:
        used = [definitions[-1].scope for definitions in item._fixtureinfo.name2fixturedefs.values()]
        if "module" in used and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.relative_to(item.config.rootpath).as_posix()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Escape the bytes of names that are not UTF-8 in what a test logged or raised; pytest-xdist cannot send them."""
    report = yield
    report.sections = [(name, _escaped(text)) for name, text in report.sections]
    if report.failed and (text := str(report.longrepr)) != _escaped(text):
        report.longrepr = _escaped(text)
    return report


def _escaped(text):
    return text.encode(errors="backslashreplace").decode()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Return memory to the system after each file: a training run made glibc keep freed memory, gigabytes of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim and (nextitem is None or nextitem.path != item.path):
        trim(0)


def pytest_unconfigure(config):
    """Print the line, after the counts."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter and not hasattr(config, "workerinput") else []
    if path := os.environ.get("DINOV2_SKIPPED"):
        with open(path, "a") as file:  # pytest-xdist adds @<group>
            file.writelines(re.sub(r"@[^@\]]*$", "", report.nodeid) + "\n" for report in skipped)
    reasons = [str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped]
    tools = Counter(match[1] for reason in reasons if (match := re.match("needs ([^:]+)", reason)))
    if tools:
        counts = ", ".join(f"{number} need {tool}" for tool, number in tools.most_common())
        reporter.write_line(f"skipped: {counts}; .ci/run, as root, installs what it can and runs them")
