"""Whole topologies in every format, and back; what is lost is told."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ivshmem_lab.errors import UsageError
from ivshmem_lab.topology.formats.lost import Lost, difference
from ivshmem_lab.topology.formats.whole import WHOLE_FORMATS, guess, named
from ivshmem_lab.topology.model import HostPeer, Link, Memory, Server, Topology, Vm
from ivshmem_lab.topology.validate import validate

BOARD, FRAME = Server("board", 4 << 20, 2), Memory("frame", 1 << 20)
TEXTS = st.sampled_from(["pingpong", "/tmp/a b.elf", "role=ping 'x' \"y\" \\ \n, #1; & <é>", ""]) | st.text(max_size=6)
NAMES = ("a", "b-1", "lab", "class", "vier.é")


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Make up a valid topology with all that a topology can say."""
    sizes = st.sampled_from([1 << 12, 1 << 20, 4 << 20])
    policies = [draw(st.sampled_from([None, 1, 70])) for _ in range(2)]
    servers = [
        Server(n, draw(sizes), draw(st.integers(0, 3)), *policies) for n in ("s", "s.sock") if draw(st.booleans())
    ]
    memories = [Memory(n, draw(sizes)) for n in ("m", "no-1") if draw(st.booleans())]
    masters, switches = st.sampled_from([None, "on", "off", "auto"]), st.sampled_from([None, True, False])
    ends = [
        st.builds(Link, st.just(x.name), st.none(), st.sampled_from([None, 1, 2]), masters, switches) for x in servers
    ]
    ends += [st.builds(Link, st.none(), st.just(x.name), st.none(), masters) for x in memories]
    links = st.lists(st.one_of(ends), max_size=3).map(tuple) if ends else st.just(())
    guests, memory = st.none() | TEXTS, st.sampled_from([None, 1 << 20, 32 << 20])
    vms = [
        Vm(n, draw(st.sampled_from(["unicorn", "qemu"])), draw(guests), draw(guests), draw(memory), devices=draw(links))
        for n in draw(st.lists(st.sampled_from(NAMES), max_size=3, unique=True))
    ]
    vms = [replace(vm, guest="linux", emulator="qemu") if draw(st.integers(0, 9)) == 0 else vm for vm in vms]
    ports = [draw(st.sampled_from([None, 3, 4])) for _ in vms]
    machines = ["q35" if p else "pc" for p in ports]
    vms = [replace(vm, root_ports=p, machine=m, cpu=p) for vm, p, m in zip(vms, ports, machines, strict=True)]
    vms = [
        replace(vm, accel=draw(st.sampled_from(["tcg", "kvm", "auto"]))) if vm.emulator == "qemu" else vm for vm in vms
    ]
    peers = [HostPeer("me", draw(st.sampled_from(servers)).name)] if servers and draw(st.booleans()) else []
    return Topology(tuple(servers), tuple(memories), tuple(vms), tuple(peers))


@pytest.mark.parametrize("name", WHOLE_FORMATS)
@example(Topology())
@given(topologies())
def test_what_is_written_is_read_back_but_for_what_is_told(name: str, topology: Topology) -> None:
    assert validate(topology) == []
    form = WHOLE_FORMATS[name]
    rendered = form.write(topology)
    read = form.parse(rendered.text).topology
    if name in ("yaml", "json"):
        assert (rendered.lost, read) == ((), topology)
    told = {lost.path for lost in rendered.lost}
    for lost in difference(topology, read, {"": "?"}, in_order=name != "python"):
        assert lost.path in told
    assert all(lost.what and lost.why for lost in rendered.lost)
    if not told and name != "python":
        assert by_name(read) == by_name(topology)
    if not told:
        assert form.parse(form.write(read).text).topology == read


def by_name(topology: Topology) -> Topology:
    """Put what is shared in the order of names: it has no meaning."""
    servers, memories = sorted(topology.servers, key=repr), sorted(topology.memories, key=repr)
    return replace(topology, servers=tuple(servers), memories=tuple(memories))


@st.composite
def sayable(draw: st.DrawFn) -> Topology:
    """Make up a topology that every format can say."""
    servers = [Server(n, 1 << 22, draw(st.integers(1, 3))) for n in ("s", "t")]
    memories = [Memory("m", draw(st.sampled_from([1 << 20, 1 << 30])))]
    own = st.sampled_from(["on", "off"])
    vms = [
        Vm(
            name,
            draw(st.sampled_from(["unicorn", "qemu"])),
            draw(st.none() | st.just("/a b.elf")),
            draw(st.none() | st.just('say="a b" \\ \'')),
            draw(st.sampled_from([1 << 20, 32 << 20])),
            cpu=draw(st.sampled_from([None, 3])),
            devices=(*(Link(server=x.name) for x in servers), Link(memory="m", master=draw(own))),
        )
        for name in ("lab", "b-1", "c")
    ]
    vms.append(
        Vm(
            "q",
            "qemu",
            "/a.elf",
            None,
            1 << 20,
            "q35",
            None,
            3,
            draw(st.sampled_from(["tcg", "kvm"])),
            (Link(server="s", master=draw(own)),),
        )
    )
    return Topology(tuple(servers), tuple(memories), tuple(vms), ())


@pytest.mark.parametrize("name", WHOLE_FORMATS)
@given(sayable())
def test_nothing_is_lost_of_what_every_format_can_say(name: str, topology: Topology) -> None:
    rendered = WHOLE_FORMATS[name].write(topology)
    wrong = [str(lost) for lost in rendered.lost if name != "libvirt" or not lost.path.startswith("servers.")]
    assert wrong == []
    parsed = WHOLE_FORMATS[name].parse(rendered.text)
    assert parsed.topology == topology
    assert guess(rendered.text) == name


def test_positions_are_kept_by_files_and_told_by_the_others() -> None:
    for name, form in WHOLE_FORMATS.items():
        rendered = form.write(Topology((BOARD,)), {"board": (8, 16)})
        if name in ("yaml", "json"):
            assert form.parse(rendered.text).positions == {"board": (8, 16)}
        else:
            assert rendered.lost[-1] == Lost("positions", "where 1 nodes are drawn", f"{name} has no place for it")


def test_guests_have_their_files_in_formats_that_name_files() -> None:
    guests = {"pingpong": "/opt/pingpong.elf"}
    topology = Topology((), (), (Vm("a", memory_bytes=32 << 20), Vm("b", guest=None, memory_bytes=32 << 20)))
    for name in ("qemu", "legacy", "libvirt"):
        rendered = WHOLE_FORMATS[name].write(topology, guests=guests)
        assert ("/opt/pingpong.elf" in rendered.text, rendered.lost) == (True, ())
        assert WHOLE_FORMATS[name].parse(rendered.text, guests=guests).topology == topology


LEGACY = """\
#!/bin/bash
ivshmem_server -m 4 &
sudo kvm -name "guest=first,process=x" -m 1G -smp 2 -hda disk.img \\
    -chardev socket,path=/var/run/ivshmem/one,id=c,server=off \\
    -device ivshmem,chardev=c,size=8,vectors=4,msi=off,id=nic,addr=0x5   # as in the paper
exec taskset -c 1 qemu-system-x86_64 -M pc-q35-2.9,accel=kvm -kernel bzImage -append "console=ttyS0" \\
    -chardev socket,path=/var/run/ivshmem/one,id=c -device ivshmem,chardev=c,size=8,vectors=2,role=peer \\
    -device ivshmem,shm=scratch,size=1M,use64=0; echo done
"""


def test_a_legacy_script_becomes_a_topology_and_the_rest_is_told() -> None:
    parsed = named(guess(LEGACY)).parse(LEGACY, guests={"probe": "/probe.elf"})
    scratch = Link(memory="scratch")
    assert parsed.topology == Topology(
        (Server("one", 8 << 20, 4),),
        (Memory("scratch", 1 << 20),),
        (
            Vm("first", "qemu", None, None, 1 << 30, accel="kvm", devices=(Link(server="one"),)),
            Vm(
                "vm2",
                "qemu",
                "./bzImage",
                "console=ttyS0",
                machine="q35",
                cpu=1,
                accel="kvm",
                devices=(Link(server="one", vectors=2, master="off"), scratch),
            ),
        ),
    )
    assert validate(parsed.topology) == []
    told = [(lost.path, lost.what) for lost in parsed.lost]
    assert told == [
        ("file", "ivshmem_server -m 4"),
        ("vms.first", "-name process=x"),
        ("vms.first", "ivshmem device 'nic': id=nic"),
        ("vms.first", "ivshmem device 'nic': addr=0x5"),
        ("vms.first", "ivshmem device 'nic': msi=off"),
        ("vms.first", "-chardev server=off"),
        ("vms.first", "-smp 2"),
        ("vms.first", "-hda disk.img"),
        ("vms.vm2", "ivshmem device with shm=scratch: use64=0"),
        ("vms.vm2", "-machine pc-q35-2.9"),
        ("file", "echo done"),
        ("vms.vm2.devices[0]", "a device that is there at the start"),
    ]


def test_names_that_are_taken_or_none_are_changed_and_told() -> None:
    text = (
        "qemu-system-x86_64 -name 'my vm' -chardev socket,id=c,path=/a/vm -device ivshmem-doorbell,chardev=c\n"
        "qemu-system-x86_64 -name vm -chardev socket,id=c,path=/b/vm.sock -device ivshmem-doorbell,chardev=c,vectors=3\n"
    )
    parsed = named("qemu").parse(text)
    assert [server.name for server in parsed.topology.servers] == ["vm", "vm-2"]
    assert [vm.name for vm in parsed.topology.vms] == ["my-vm", "vm-3"]
    assert [lost.what for lost in parsed.lost if lost.path in ("my-vm", "vm-2", "vm-3")] == [
        "the name '/b/vm.sock'",
        "the name 'my vm'",
        "the name 'vm'",
    ]
    assert [lost.path for lost in parsed.lost if lost.what == "the size"] == ["servers.vm.size", "servers.vm-2.size"]


def test_a_backend_of_another_kind_is_told() -> None:
    text = "qemu-system-x86_64 -object memory-backend-file,id=m,mem-path=/huge/x,size=2M -device ivshmem-plain,memdev=m"
    parsed = named("qemu").parse(text)
    assert parsed.topology.memories == (Memory("x", 2 << 20),)
    assert "memory of the lab's own instead, named x" in str(parsed.lost[0])


@pytest.mark.parametrize(
    ("options", "accel", "lost"),
    [
        ("", "tcg", []),
        ("-accel tcg", "tcg", []),
        ("-enable-kvm", "kvm", []),
        ("-machine pc,accel=kvm:tcg", "auto", []),
        ("-accel kvm -accel tcg", "auto", []),
        ("-accel tcg -accel kvm", "tcg", []),
        ("-accel hvf -accel tcg,thread=multi", "tcg", ["-accel thread=multi", "-accel hvf"]),
    ],
)
def test_accelerators_are_read_as_qemu_tries_them(options: str, accel: str, lost: list[str]) -> None:
    parsed = named("qemu").parse(f"qemu-system-x86_64 {options}")
    assert parsed.topology.vms[0].accel == accel
    assert [each.what for each in parsed.lost] == lost


DOMAIN = """\
<?xml version="1.0"?>
<!-- dumped -->
<domain type='kvm' id='3'>
  <name>web</name>
  <uuid>5a1c</uuid>
  <memory unit='MB'>64</memory>
  <currentMemory unit='KiB'>62500</currentMemory>
  <vcpu placement='static' cpuset='2'>4</vcpu>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><boot dev='hd'/></os>
  <features><acpi/></features>
  <devices>
    <emulator>/usr/libexec/qemu-kvm</emulator>
    <disk type='file'/>
    <controller type='pci' index='0' model='pcie-root'/>
    <controller type='pci' index='1' model='pcie-root-port'/>
    <shmem name='plain' role='peer'><model type='ivshmem-plain'/><size unit='M'>2</size><alias name='shmem0'/></shmem>
    <shmem name='bell'><model type='ivshmem-doorbell'/><server/><msi vectors='8' ioeventfd='on'/></shmem>
    <shmem name='old'><size unit='M'>4</size></shmem>
    <shmem name='older'><server path='/tmp/s'/><msi/></shmem>
  </devices>
</domain>
"""


def test_a_domain_becomes_a_topology_and_the_rest_is_told() -> None:
    parsed = named(guess(DOMAIN)).parse(DOMAIN)
    assert parsed.topology.servers == (Server("shmem-bell-sock", 4 << 20, 8), Server("s", 4 << 20, 1))
    assert parsed.topology.memories == (Memory("plain", 2 << 20), Memory("old", 4 << 20))
    (web,) = parsed.topology.vms
    assert (web.name, web.machine, web.cpu, web.root_ports, web.memory_bytes) == ("web", "q35", 2, 1, 64_000_000)
    assert web.devices == (
        Link(memory="plain", master="off"),
        Link(server="shmem-bell-sock", ioeventfd=True),
        Link(memory="old"),
        Link(server="s"),
    )
    told = [lost.what for lost in parsed.lost]
    assert web.accel == "kvm"
    for what in ("<uuid>", "4 vCPUs", "os: <boot dev='hd'>", "devices: <disk type='file'>"):
        assert what in told
    assert "shmem plain: <alias name='shmem0'>" in told
    assert not any("controller" in what or "Memory" in what for what in told)


BOMB = '<!DOCTYPE d [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><domain><name>&b;</name></domain>'


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("libvirt", BOMB, "the XML has a document type (d), which can make it grow"),
        ("libvirt", '<!DOCTYPE d SYSTEM "file:///etc/passwd"><domain/>', "the XML has a document type (d)"),
        ("libvirt", "<domain>", "1:9: no XML"),
        ("libvirt", "<pool/>", "<pool> is no domain"),
        ("libvirt", "<domains><pool/></domains>", "<domains> is no domain"),
        ("libvirt", "<domain><memory unit='q'>1</memory></domain>", "<memory> has unit='q'"),
        ("libvirt", "<domain><memory>x</memory></domain>", "<memory> expects a number, not 'x'"),
        (
            "libvirt",
            "<domain><devices><shmem name='x'><model type='ivshmem-doorbell'/></shmem></devices></domain>",
            "vms.vm1: shmem 'x' is an ivshmem-doorbell without a <server>",
        ),
        (
            "libvirt",
            "<domain><devices><shmem name='x' role='boss'/></devices></domain>",
            "vms.vm1: shmem 'x' has role='boss'; there are master and peer",
        ),
        ("qemu", "echo hello", "there is no QEMU command line"),
        ("qemu", "qemu-system-x86_64 'x", "the command line cannot be split"),
        ("qemu", "qemu-system-x86_64 -m", "-m: requires an argument"),
        (
            "qemu",
            "kvm -device ivshmem-doorbell,chardev=c",
            "ivshmem device with chardev=c: there is no -chardev socket,id=c",
        ),
        ("qemu", "kvm -device ivshmem-plain,memdev=c", "ivshmem device with memdev=c: there is no -object with id=c"),
        ("qemu", "ivshmem-server -n x", "-n expects a number, not 'x'"),
        ("qemu", "ivshmem-server -n", "ivshmem-server: argument -n/--vectors: expected one argument"),
        ("legacy", "kvm -device ivshmem", "-device ivshmem: You must specify either 'shm' or 'chardev'"),
        ("python", "import os", "program:1:1: this is not read: only lab.server"),
        ("python", "x = (", "program:1:5: no Python"),
        ("python", "x = 1\0", "program"),
        ("python", "with Lab() as lab:\n  lab.server(open('x'))", "program:2:14: this is no plain value"),
        ("python", "lab.server('a'); lab.server('a')", "program:1:18: the name 'a' is taken"),
        ("python", "a.plug(b)", "program:1:1: this is no member of the lab that was made before: a"),
        ("python", "lab.vm('a', gust='x')", "program:1:18: there is no property 'gust'"),
        ("python", "lab.vm('a', **x)", "program:1:15: ** is not read"),
        ("python", "a = lab.vm('a')\na.plug(a)", "program:2:8: a is no server and no memory"),
        ("python", "lab.server('a', '4X')", "program:1:17: size '4X' is not a size"),
        ("python", "lab.server('a', vectors='2')", "program:1:25: vectors='2' is of the wrong kind"),
        ("python", "lab.peer('a')", "program:1:1: lab.peer('a') needs connect=SERVER"),
        ("python", "lab.memory('m')\nlab.peer('a', connect=lab['m'])", "program:2:23: connect= takes servers"),
        ("python", "while True: pass", "program:1:1: this is not read"),
        ("python", "lab.vm(7)", "program:1:8: a name is a text, not 7"),
        ("python", "lab = lab.vm('x')", "program:1:1: lab is the lab itself"),
    ],
)
def test_what_is_wrong_is_refused_with_its_place(name: str, text: str, error: str) -> None:
    with pytest.raises(UsageError, match="^" + re.escape(error)):
        named(name).parse(text, "program")


def test_a_format_that_is_none_is_named() -> None:
    with pytest.raises(
        UsageError, match="there is no format 'xml'; there are yaml, json, qemu, legacy, libvirt, python"
    ):
        named("xml")


NOTEBOOK = """\
from ivshmem_lab import Lab
lab = Lab()
board = lab.server("board", "4M", vectors=2)
frame = lab.memory("frame", size=1048576)
"""


def test_the_lines_of_a_notebook_are_read_too() -> None:
    text = (
        NOTEBOOK
        + "alice = lab.vm('alice', 'pingpong', {'rounds': 3, 'quiet': True}, connect=[board, board], memory='64')\n"
    )
    text += "me = lab.peer('me', board)\nalice.start()\nalice.plug(frame, master='off')\n"
    devices = (Link(server="board"), Link(server="board"), Link(memory="frame", master="off"))
    alice = Vm("alice", args="rounds=3 quiet=1", memory_bytes=64 << 20, devices=devices)
    assert named(guess(text)).parse(text).topology == Topology((BOARD,), (FRAME,), (alice,), (HostPeer("me", "board"),))


@given(st.sampled_from(list(WHOLE_FORMATS)), st.text(max_size=60))
def test_any_text_is_read_or_refused(name: str, text: str) -> None:
    try:
        parsed = WHOLE_FORMATS[name].parse(text)
    except UsageError:
        return
    assert isinstance(parsed.topology, Topology)
    WHOLE_FORMATS[guess(text)]


CUTS = st.tuples(
    st.floats(0, 1), st.integers(0, 12), st.sampled_from(["", "0", "-1", "x", '"', "\\", ",", "=", "\n", "<", "("])
)


@given(st.sampled_from(list(WHOLE_FORMATS)), topologies(), st.lists(CUTS, min_size=1, max_size=4))
def test_a_text_with_mistakes_is_read_or_refused(
    name: str, topology: Topology, cuts: list[tuple[float, int, str]]
) -> None:
    text = WHOLE_FORMATS[name].write(topology).text
    for where, length, instead in cuts:
        at = int(where * len(text))
        text = text[:at] + instead + text[at + length :]
    try:
        parsed = WHOLE_FORMATS[name].parse(text)
    except UsageError:
        return
    for form in WHOLE_FORMATS.values():
        if validate(parsed.topology) == []:
            form.write(parsed.topology)
