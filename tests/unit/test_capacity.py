"""Capacity detection on fake /proc and control group trees."""

import mmap
import os
import resource
from pathlib import Path

import psutil
import pytest

from penstock.memory.capacity import disk_capacity, host_capacity, memlock_limit, process_io, process_memory
from penstock.memory.cgroups import read_cgroup_limits
from penstock.memory.errors import PenstockError

MIB = 2**20
GIB = 2**30
V1_UNLIMITED = "9223372036854771712"


class Tree:
    """A fake machine: 16 GiB of RAM, 12 GiB of it available."""

    def __init__(self, root: Path) -> None:
        self.proc = root / "proc"
        self.v1 = root / "sys" / "memory"
        self.v2 = root / "sys" / "unified group"  # with a space: the mount table escapes it
        (self.proc / "self").mkdir(parents=True)
        self.v1.mkdir(parents=True)
        self.v2.mkdir(parents=True)
        (self.proc / "meminfo").write_text(
            "MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:   12582912 kB\nSwapTotal: 99999999 kB\n"
        )
        self.mounts("")

    def member(self, *lines: str) -> None:
        (self.proc / "self" / "cgroup").write_text("\n".join(lines) + "\n")

    def mounts(self, *kinds: str, v1_root: str = "/", v2_root: str = "/") -> None:
        lines = ["21 20 8:1 / / rw - ext4 /dev/sda rw"]
        if "v1" in kinds:
            lines.append(f"30 20 0:1 {v1_root} {self.v1} rw,nosuid shared:9 - cgroup cgroup rw,memory")
        if "v2" in kinds:
            escaped = str(self.v2).replace(" ", "\\040")
            lines.append(f"31 20 0:2 {v2_root} {escaped} rw - cgroup2 cgroup2 rw,nsdelegate")
        (self.proc / "self" / "mountinfo").write_text("\n".join(lines) + "\n")

    def group_v1(self, path: str, limit: int | str, usage: int, stat: str = "", hierarchy: int = 1) -> Path:
        folder = self.v1 / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
        (folder / "memory.use_hierarchy").write_text(f"{hierarchy}\n")
        (folder / "memory.stat").write_text(stat)
        return folder

    def group_v2(self, path: str, maximum: int | str, usage: int, inactive: int = 0, high: int | str = "max") -> Path:
        folder = self.v2 / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{maximum}\n")
        (folder / "memory.high").write_text(f"{high}\n")
        (folder / "memory.current").write_text(f"{usage}\n")
        (folder / "memory.stat").write_text(f"anon 1\nfile 2\ninactive_file {inactive}\nactive_file 7\n")
        return folder


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_without_control_groups_memavailable_counts_and_swap_does_not(tree: Tree) -> None:
    capacity = host_capacity(tree.proc)
    assert (capacity.total_nbytes, capacity.available_nbytes) == (16 * GIB, 12 * GIB)
    assert (capacity.limit_nbytes, capacity.limit_source, capacity.available_source) == (None, None, "MemAvailable")


def test_v2_limit_minus_usage_plus_inactive_file(tree: Tree) -> None:
    tree.mounts("v2")
    tree.member("0::/job")
    folder = tree.group_v2("job", 4 * GIB, 3 * GIB, inactive=512 * MIB)
    capacity = host_capacity(tree.proc)
    assert capacity.limit_nbytes == 4 * GIB
    assert capacity.limit_source == capacity.available_source == str(folder / "memory.max")
    assert capacity.available_nbytes == 1 * GIB + 512 * MIB


def test_page_cache_in_use_is_not_available_but_obtainable(tree: Tree) -> None:
    tree.mounts("v1", "v2")
    tree.member("0::/job", "4:memory:/old")
    folder = tree.group_v2("job", 4 * GIB, 4 * GIB, inactive=512 * MIB)
    (folder / "memory.stat").write_text(f"inactive_file {512 * MIB}\nactive_file {GIB}\n")
    stat = f"active_file 5\ntotal_inactive_file {256 * MIB}\ntotal_active_file {3 * GIB}\n"
    tree.group_v1("old", 4 * GIB, 4 * GIB, stat)
    capacity = host_capacity(tree.proc)
    assert capacity.available_nbytes == 256 * MIB
    assert capacity.obtainable_nbytes == GIB + 512 * MIB


def test_nested_v2_takes_the_tightest_of_every_level(tree: Tree) -> None:
    # The smallest limit is the leaf's, the least room is in the middle: siblings have used it up.
    tree.mounts("v2")
    tree.member("0::/a/b/c")
    tree.group_v2("a", "max", 11 * GIB)
    middle = tree.group_v2("a/b", 8 * GIB, 7 * GIB)
    leaf = tree.group_v2("a/b/c", 2 * GIB, 0)
    capacity = host_capacity(tree.proc)
    assert (capacity.limit_nbytes, capacity.limit_source) == (2 * GIB, str(leaf / "memory.max"))
    assert (capacity.available_nbytes, capacity.available_source) == (1 * GIB, str(middle / "memory.max"))


def test_v2_memory_high_is_a_limit_too(tree: Tree) -> None:
    tree.mounts("v2")
    tree.member("0::/job")
    folder = tree.group_v2("job", 4 * GIB, 1 * GIB, high=3 * GIB)
    capacity = host_capacity(tree.proc)
    assert (capacity.limit_nbytes, capacity.limit_source) == (3 * GIB, str(folder / "memory.high"))
    assert capacity.available_nbytes == 2 * GIB


def test_a_group_over_its_limit_has_no_room(tree: Tree) -> None:
    tree.mounts("v2")
    tree.member("0::/job")
    tree.group_v2("job", 1 * GIB, 2 * GIB)
    assert host_capacity(tree.proc).available_nbytes == 0


@pytest.mark.parametrize(
    ("stat", "reclaimable"), [("inactive_file 5\ntotal_inactive_file 4096\n", 4096), ("inactive_file 5\n", 5)]
)
def test_v1_counts_inactive_file_of_the_whole_subtree(tree: Tree, stat: str, reclaimable: int) -> None:
    tree.mounts("v1")
    tree.member("9:name=systemd:/x", "4:cpu,memory:/docker/abc", "1:cpuset:/y")
    folder = tree.group_v1("docker/abc", 3 * GIB, 1 * GIB, stat)
    capacity = host_capacity(tree.proc)
    assert (capacity.limit_nbytes, capacity.limit_source) == (3 * GIB, str(folder / "memory.limit_in_bytes"))
    assert capacity.available_nbytes == 2 * GIB + reclaimable


def test_unlimited_groups_of_both_versions_limit_nothing(tree: Tree) -> None:
    tree.mounts("v1", "v2")
    tree.member("4:memory:/a", "0::/a")
    tree.group_v1("", V1_UNLIMITED, 9 * GIB)
    tree.group_v1("a", V1_UNLIMITED, 9 * GIB, f"hierarchical_memory_limit {V1_UNLIMITED}\n")
    tree.group_v2("a", "max", 9 * GIB)
    assert read_cgroup_limits(tree.proc) == ()
    assert host_capacity(tree.proc).available_nbytes == 12 * GIB


def test_hybrid_uses_the_version_that_has_the_memory_controller(tree: Tree) -> None:
    tree.mounts("v1", "v2")
    tree.member("4:memory:/a/b", "0::/system.slice")
    (tree.v2 / "system.slice").mkdir()  # a unified hierarchy without memory files
    tree.group_v1("a", 5 * GIB, 4 * GIB)
    tree.group_v1("a/b", 6 * GIB, 1 * GIB)
    capacity = host_capacity(tree.proc)
    assert (capacity.limit_nbytes, capacity.available_nbytes) == (5 * GIB, 1 * GIB)


def test_v1_parent_that_is_not_hierarchical_does_not_bind(tree: Tree) -> None:
    tree.mounts("v1")
    tree.member("4:memory:/a/b")
    tree.group_v1("a", 1 * GIB, 1 * GIB, hierarchy=0)
    tree.group_v1("a/b", 6 * GIB, 1 * GIB, hierarchy=0)
    assert [limit.limit_nbytes for limit in read_cgroup_limits(tree.proc)] == [6 * GIB]


def test_container_without_namespace_sees_its_group_at_the_mount_point(tree: Tree) -> None:
    # The path is the host's, and the mount shows exactly that group (bind mount of a container).
    tree.mounts("v1", v1_root="/docker/abc")
    tree.member("4:memory:/docker/abc/inner")
    tree.group_v1("", 4 * GIB, 2 * GIB)
    tree.group_v1("inner", V1_UNLIMITED, 1 * GIB)
    assert host_capacity(tree.proc).available_nbytes == 2 * GIB


@pytest.mark.parametrize("path", ["/../../elsewhere", "/not/mounted/here", "/"])
def test_group_that_is_not_visible_is_taken_from_the_mount_point(tree: Tree, path: str) -> None:
    tree.mounts("v2")
    tree.member(f"0::{path}")
    tree.group_v2("", 4 * GIB, 1 * GIB)
    assert host_capacity(tree.proc).available_nbytes == 3 * GIB


def test_v1_limit_above_the_mount_point_is_known_from_memory_stat(tree: Tree) -> None:
    tree.mounts("v1")
    tree.member("4:memory:/")
    tree.group_v1("", 8 * GIB, 1 * GIB, f"total_inactive_file 0\nhierarchical_memory_limit {2 * GIB}\n")
    capacity = host_capacity(tree.proc)
    assert (capacity.limit_nbytes, capacity.available_nbytes) == (2 * GIB, 1 * GIB)
    assert capacity.limit_source is not None
    assert "hierarchical_memory_limit" in capacity.limit_source


def test_limit_above_the_machine_is_no_limit(tree: Tree) -> None:
    tree.mounts("v2")
    tree.member("0::/job")
    tree.group_v2("job", 64 * GIB, 1 * GIB)
    capacity = host_capacity(tree.proc)
    assert (capacity.limit_nbytes, capacity.available_nbytes) == (None, 12 * GIB)


def test_this_machine_agrees_with_psutil() -> None:
    assert host_capacity().total_nbytes == psutil.virtual_memory().total


def test_disk_of_a_folder_that_does_not_exist_is_that_of_its_parent(tmp_path: Path) -> None:
    disk = disk_capacity(tmp_path / "not" / "there")
    space = os.statvfs(tmp_path)
    assert disk.folder == str(tmp_path)
    assert disk.total_nbytes == space.f_blocks * space.f_frsize
    assert 0 <= disk.free_nbytes <= disk.total_nbytes


def test_filesystem_is_that_of_the_longest_and_last_mount(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tree.proc / "self" / "mountinfo").write_text(
        f"1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:5 / {tmp_path}/cache rw - xfs /dev/sdb rw\n"
        f"3 1 0:6 / {tmp_path}/cache rw shared:1 master:2 - tmpfs tmpfs rw\n4 1 0:7 / {tmp_path}/ca rw - nfs x rw\n"
    )
    inside, outside = disk_capacity(tmp_path / "cache" / "x", tree.proc), disk_capacity(tmp_path, tree.proc)
    assert (inside.filesystem, inside.in_memory) == ("tmpfs", True)
    assert (outside.filesystem, outside.in_memory) == ("ext4", False)


def test_process_counters_are_read_in_bytes(tree: Tree) -> None:
    (tree.proc / "self" / "status").write_text(
        "Name:\tx\nVmHWM:\t 40 kB\nRssAnon:\t 3 kB\nRssFile:\t 5 kB\nRssShmem:\t 7 kB\n"
    )
    (tree.proc / "self" / "io").write_text(
        "rchar: 11\nwchar: 12\nsyscr: 1\nsyscw: 2\nread_bytes: 4096\nwrite_bytes: 8192\n"
    )
    memory, io = process_memory(tree.proc), process_io(tree.proc)
    assert (memory.anonymous_nbytes, memory.file_nbytes, memory.shared_nbytes) == (3 * 1024, 5 * 1024, 7 * 1024)
    assert memory.peak_resident_nbytes == 40 * 1024
    assert (io.read_nbytes, io.write_nbytes) == (4096, 8192)
    assert (io.requested_read_nbytes, io.requested_write_nbytes) == (11, 12)


def test_anonymous_memory_of_this_process_grows_by_what_it_touches() -> None:
    nbytes = 64 * MIB
    # Pages of the kernel's: what malloc hands out may have been touched, and counted, before a test that freed it.
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        before = process_memory().anonymous_nbytes
        for offset in range(0, nbytes, mmap.PAGESIZE):
            block[offset] = 1
        grown = process_memory().anonymous_nbytes - before
    assert nbytes - 2 * MIB <= grown <= nbytes + 8 * MIB


def test_counters_that_the_system_hides_are_named(tree: Tree) -> None:
    (tree.proc / "self" / "status").write_text("VmHWM: 1 kB\nRssFile: 5 kB\n")
    with pytest.raises(PenstockError, match="RssAnon, RssShmem"):
        process_memory(tree.proc)
    with pytest.raises(PenstockError, match=r"self/io.*/proc mounted"):
        process_io(tree.proc)


def test_memlock_is_the_soft_limit() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    assert memlock_limit() == (None if soft == resource.RLIM_INFINITY else soft)
