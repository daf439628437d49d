"""The QMP commands of this machine: arguments in, answers in QEMU's shapes out.

Ref: QEMU 7.2 QMP reference manual (run-state, machine, qdev, qom, char, pci, object).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .chardev import BACKENDS
from .link import ServerLink
from .migration.state import carries_memory
from .options import MACHINES
from .pci_report import pci_devices
from .qmp import DEVICE_NOT_FOUND, VERSION, Command, Json, QmpError, no_more, take
from .runner import RunState

if TYPE_CHECKING:
    from ..device.pci import PciFunction
    from ..pc.bridges import PciBridge
    from ..pc.hostbridge import PciBus
    from .backends import MemoryBackend
    from .emulator import Emulator


def commands(emulator: Emulator) -> dict[str, Command]:
    """Return the command handlers of an emulator, by name."""
    table = _Commands(emulator)
    handlers: dict[str, Command] = {
        "query-status": table.query_status,
        "query-version": table.query_version,
        "query-commands": table.query_commands,
        "query-name": table.query_name,
        "query-machines": table.query_machines,
        "query-pci": table.query_pci,
        "cont": table.cont,
        "stop": table.stop,
        "system_reset": table.system_reset,
        "device_add": table.device_add,
        "device_del": table.device_del,
        "object-add": table.object_add,
        "object-del": table.object_del,
        "chardev-add": table.chardev_add,
        "chardev-remove": table.chardev_remove,
        "qom-get": table.qom_get,
        "qom-list": table.qom_list,
        "x-query-ivshmem": table.query_ivshmem,
        "quit": table.quit,
        **emulator.migration.commands(),
    }
    table.names = ["qmp_capabilities", *handlers]
    return handlers


class _Commands:
    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self.names: list[str] = []
        self._machine = MACHINES[emulator.options.machine]

    # -- run state -----------------------------------------------------------------------------------

    async def query_status(self, arguments: Json) -> Json:
        no_more(arguments)
        state = self.emulator.state
        return {"status": state.value, "singlestep": False, "running": state is RunState.RUNNING}

    async def query_version(self, arguments: Json) -> Json:
        no_more(arguments)
        return VERSION

    async def query_commands(self, arguments: Json) -> list[Json]:
        no_more(arguments)
        return [{"name": name} for name in sorted(self.names)]

    async def query_name(self, arguments: Json) -> Json:
        no_more(arguments)
        return {"name": self.emulator.options.name} if self.emulator.options.name else {}

    async def query_machines(self, arguments: Json) -> list[Json]:
        no_more(arguments)
        machines = []
        for alias, name in MACHINES.items():
            machine: Json = {
                "name": name,
                "cpu-max": 1,
                "hotpluggable-cpus": False,
                "numa-mem-supported": False,
                "deprecated": False,
                "default-ram-id": "ram" if name == "none" else "pc.ram",
            }
            if alias != name:
                machine |= {"alias": alias, "default-cpu-type": "qemu64-x86_64-cpu"}
            if alias == "pc":
                machine["is-default"] = True
            machines.append(machine)
        return machines

    async def cont(self, arguments: Json) -> Json:
        no_more(arguments)
        if self.emulator.state is RunState.INTERNAL_ERROR:
            raise QmpError("Resetting the Virtual Machine is required")
        if self.emulator.state is RunState.FINISH_MIGRATE:
            raise QmpError("Migration is not finalized yet")
        if self.emulator.migration.start_on_arrival(start=True):
            return {}
        if self.emulator.state is not RunState.RUNNING:
            await self.emulator.on_vcpu(self._resume)
        return {}

    def _resume(self) -> None:
        self.emulator.runner.resume()
        self.emulator.emit_later("RESUME", None)  # from the vCPU's thread: before whatever its guest makes of it

    async def stop(self, arguments: Json) -> Json:
        no_more(arguments)
        self.emulator.migration.start_on_arrival(start=False)
        if self.emulator.state is RunState.RUNNING:
            await self.emulator.on_vcpu(self.emulator.runner.pause)
            self.emulator.emit("STOP", None)
        return {}

    async def system_reset(self, arguments: Json) -> Json:
        no_more(arguments)
        self.emulator.migration.check_idle("system_reset")
        if self.emulator.state is RunState.INMIGRATE:
            raise QmpError("Guest is waiting for an incoming migration")

        def reset() -> None:
            self.emulator.runner.reset()
            if self.emulator.state is not RunState.RUNNING:
                self.emulator.runner.state = RunState.PRELAUNCH

        await self.emulator.on_vcpu(reset)
        self.emulator.emit("RESET", {"guest": False, "reason": "host-qmp-system-reset"})
        return {}

    async def quit(self, arguments: Json) -> Json:
        no_more(arguments)
        self.emulator.emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        self.emulator.loop.call_soon(self.emulator.end, 0)
        return {}

    # -- plugging ------------------------------------------------------------------------------------

    async def device_add(self, arguments: Json) -> Json:
        self.emulator.migration.check_idle("device_add")
        await self.emulator.device_add(_texts(arguments))
        return {}

    async def device_del(self, arguments: Json) -> Json:
        device_id = take(arguments, "id", str)
        no_more(arguments)
        self.emulator.migration.check_idle("device_del")
        await self.emulator.device_del(device_id)
        return {}

    async def object_add(self, arguments: Json) -> Json:
        for name in ("qom-type", "id", "mem-path"):
            take(dict(arguments), name, str, "")  # a number here would become a file of that name
        for name in ("qom-type", "id"):
            take(dict(arguments), name, str)
        if type(arguments.get("size", 0)) is not int:
            raise QmpError("Parameter 'size' expects uint64")
        take(dict(arguments), "share", bool, default=False)
        self.emulator.object_add(_texts(arguments))
        return {}

    async def object_del(self, arguments: Json) -> Json:
        object_id = take(arguments, "id", str)
        no_more(arguments)
        self.emulator.object_del(object_id)
        return {}

    async def chardev_add(self, arguments: Json) -> Json:
        device_id = take(arguments, "id", str)
        backend = take(arguments, "backend", dict)
        no_more(arguments)
        kind = take(backend, "type", str, within="backend.")
        if kind not in BACKENDS:
            raise QmpError(f"Parameter 'type' does not accept value '{kind}'; this machine has {', '.join(BACKENDS)}")
        data = take(backend, "data", dict, within="backend.")
        properties = {"backend": kind, "id": device_id}
        within = "backend.data."
        if kind == "socket":
            properties["path"] = _unix_path(take(data, "addr", dict, within=within), within + "addr.")
            # In QMP a socket is a server unless told otherwise (ChardevSocket, default true).
            properties["server"] = "on" if take(data, "server", bool, True, within=within) else "off"
            properties["wait"] = "on" if take(data, "wait", bool, False, within=within) else "off"
        elif kind == "file":
            properties["path"] = take(data, "out", str, within=within)
        elif kind == "stdio":
            take(data, "signal", bool, True, within=within)
        no_more(data, within)
        no_more(backend, "backend.")
        await self.emulator.chardev_add(properties)
        return {}

    async def chardev_remove(self, arguments: Json) -> Json:
        device_id = take(arguments, "id", str)
        no_more(arguments)
        self.emulator.chardev_remove(device_id)
        return {}

    # -- looking -------------------------------------------------------------------------------------

    async def query_pci(self, arguments: Json) -> list[Json]:
        no_more(arguments)
        return await self.emulator.on_vcpu(self._pci) if self._machine != "none" else []

    def _pci(self) -> list[Json]:
        # A device that was plugged without an id has none here.
        ids: dict[PciFunction, str] = {
            plugged.device: name
            for name, plugged in self.emulator.machine.peripherals.items()
            if not name.startswith("device[")
        }
        ids |= {bridge: name for name, bridge in self.emulator.machine.bridges.items()}
        return [{"bus": 0, "devices": pci_devices(self.emulator.machine.pci, 0, ids)}]

    async def qom_list(self, arguments: Json) -> list[Json]:
        path = take(arguments, "path", str)
        no_more(arguments)
        return [{"name": name, "type": kind} for name, (kind, _) in (await self._node(path)).items()]

    async def qom_get(self, arguments: Json) -> Any:
        path, name = take(arguments, "path", str), take(arguments, "property", str)
        no_more(arguments)
        node = await self._node(path)
        if name not in node:
            raise QmpError(f"Property '{node['type'][1]}.{name}' not found")
        return node[name][1]

    async def query_ivshmem(self, arguments: Json) -> list[Json]:
        """Count interrupts; QEMU has no such command, so its name begins with x-."""
        no_more(arguments)
        links = [(name, link) for name, link in self.emulator.links.items() if isinstance(link, ServerLink)]
        return [{"id": name, "sent": link.rings_sent, "heard": link.rings_heard} for name, link in links]

    async def _node(self, path: str) -> dict[str, tuple[str, Any]]:
        """Return one object of the tree: property name to (type, value)."""
        emulator = self.emulator
        if not path:
            raise QmpError("Path '' is ambiguous")
        parts = [part for part in path.split("/") if part]
        children: dict[str, str] | None = None
        match parts:
            case []:
                children = {"objects": "container", "machine": f"{self._machine}-machine", "chardevs": "container"}
            case ["machine"]:
                return {
                    "type": ("string", f"{self._machine}-machine"),
                    "peripheral": ("child<container>", "/machine/peripheral"),
                    "peripheral-anon": ("child<container>", "/machine/peripheral-anon"),
                }
            case ["objects"]:
                children = {name: backend.qom_type for name, backend in emulator.backends.items()}
            case ["chardevs"]:
                children = {name: f"chardev-{chardev.backend}" for name, chardev in emulator.chardevs.items()}
            case ["machine", "peripheral" | "peripheral-anon" as kind]:
                anonymous = kind == "peripheral-anon"
                children = {
                    name: pairs["driver"]
                    for name, pairs in emulator.properties.items()
                    if name.startswith("device[") == anonymous
                }
            case ["objects", name] if name in emulator.backends:
                return _backend_node(emulator.backends[name])
            case ["chardevs", name] if name in emulator.chardevs:
                return {"type": ("string", f"chardev-{emulator.chardevs[name].backend}")}
            case ["machine", "peripheral" | "peripheral-anon", name] if name in emulator.properties:
                return await self._device_node(name)
            case _:
                raise QmpError(f"Device '{path}' not found", DEVICE_NOT_FOUND)
        base = "/" + "/".join(parts)
        listed = {name: (f"child<{kind}>", f"{base.rstrip('/')}/{name}") for name, kind in children.items()}
        return {"type": ("string", "container"), **listed}

    async def _device_node(self, name: str) -> dict[str, tuple[str, Any]]:
        pairs = self.emulator.properties[name]
        if name in self.emulator.machine.bridges:
            return self._bridge_node(self.emulator.machine.bridges[name])
        plugged = await self.emulator.on_vcpu(lambda: self.emulator.machine.peripherals.get(name))
        if plugged is None:
            raise QmpError(f"Device '{name}' not found", DEVICE_NOT_FOUND)
        node: dict[str, tuple[str, Any]] = {
            "type": ("string", plugged.device.name),
            "realized": ("bool", True),
            "hotplugged": ("bool", plugged.hotplugged),
            "hotpluggable": ("bool", self.emulator.machine.takes_hotplug(plugged.bus)),
            "addr": ("int32", plugged.slot << 3),
            "legacy-addr": ("str", f"{plugged.slot:02x}.0"),
            "parent_bus": ("link<bus>", self._bus_path(plugged.bus)),
            "master": ("OnOffAuto", "on" if carries_memory(pairs, plugged.device.peer_id) else "off"),
        }
        if pairs["driver"] == "ivshmem":
            del node["master"]
            return node | {name: ("str", text) for name, text in pairs.items() if name not in (*node, "driver", "id")}
        if plugged.device.msix is None:
            return {**node, "memdev": ("link<memory-backend>", f"/objects/{pairs['memdev']}")}
        return {
            **node,
            "chardev": ("str", pairs["chardev"]),
            "vectors": ("uint32", plugged.device.msix.vectors),
            "ioeventfd": ("bool", pairs.get("ioeventfd", "on") == "on"),
        }

    def _bridge_node(self, bridge: PciBridge) -> dict[str, tuple[str, Any]]:
        assert bridge.bus.parent is not None
        slot = next(slot for slot, _, function in bridge.bus.parent if function is bridge)
        return {
            "type": ("string", bridge.name),
            "realized": ("bool", True),
            "hotplugged": ("bool", False),
            "hotpluggable": ("bool", self.emulator.machine.takes_hotplug(bridge.bus.parent)),
            "addr": ("int32", slot << 3),
            "legacy-addr": ("str", f"{slot:02x}.0"),
            "parent_bus": ("link<bus>", self._bus_path(bridge.bus.parent)),
        }

    def _bus_path(self, bus: PciBus) -> str:
        if bus.bridge is None:
            return f"/machine/{'q35' if self.emulator.options.machine == 'q35' else 'i440fx'}/{bus.name}"
        return f"/machine/peripheral/{bus.name}/{bus.name}"


def _unix_path(address: Json, within: str) -> str:
    """Read QMP's ``SocketAddress``: the path of a Unix socket."""
    kind = take(address, "type", str, within=within)
    if kind != "unix":
        raise QmpError(f"Parameter 'type' does not accept value '{kind}'; this machine has unix sockets")
    data = take(address, "data", dict, within=within)
    path: str = take(data, "path", str, within=within + "data.")
    no_more(data, within + "data.")
    no_more(address, within)
    return path


def _texts(arguments: Json) -> dict[str, str]:
    """Turn QMP's values into the words of a command line: both go the same way from here."""
    texts = {}
    for name, value in arguments.items():
        if isinstance(value, bool):
            texts[name] = "on" if value else "off"
        elif isinstance(value, int | str):
            texts[name] = str(value)
        else:
            raise QmpError(f"Invalid parameter type for '{name}', expected: string")
    return texts


def _backend_node(backend: MemoryBackend) -> dict[str, tuple[str, Any]]:
    return {
        "type": ("string", backend.qom_type),
        "size": ("int", backend.size_bytes),
        "share": ("bool", backend.share),
    }
