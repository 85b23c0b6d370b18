"""Who started this process: SLURM, Open MPI, Cloud TPU, Kubernetes, or a person with flags or environment variables.

Each launcher tells its processes in environment variables, or by a service, how many they are, and where process 0 is.
jax reads some of them, but it gives every task of SLURM and Open MPI one GPU, also if there is only one task a node.
"""

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from tiue_jax.models.platforms import tpu_devices

BY_FLAGS = "flags"
FLAGS = ("coordinator_address", "num_processes", "process_id")
ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
OTHERWISE = (
    "to choose otherwise, give --coordinator_address, --num_processes and --process_id, or only --num_processes=1 to "
    "train with this process alone"
)

Environment = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of this process among those that train together.

    Attributes:
        launcher: who says so.
        coordinator_address: host:port of process 0; None if there is one process.
        num_processes: number of processes.
        process_id: number of this process, from 0.
        gpus: the GPUs of this process, by number among the visible ones; None for all of them.
        visible_gpus: number of the GPUs that this process could use.
    """

    launcher: str
    coordinator_address: str | None
    num_processes: int
    process_id: int
    gpus: tuple[int, ...] | None = None
    visible_gpus: int = 0

    def devices(self) -> str:
        """The devices that this process trains on, as text. It is known without jax, which finds its devices later."""
        if self.gpus is not None:
            return f"{len(self.gpus)} of {self.visible_gpus} GPUs"
        if self.visible_gpus:
            return f"{self.visible_gpus} GPUs"
        return f"{chips} TPU chips" if (chips := len(tpu_devices())) else "no GPU and no TPU"


@dataclasses.dataclass(frozen=True)
class Launcher:
    """A program that starts processes.

    Attributes:
        name: for people.
        started: says from the environment whether this launcher started this process.
        place: the address of process 0, the number of processes and the number of this process. It may ask a service
            and wait, up to the given number of seconds. It may raise any exception.
        tasks_here: the number of tasks on this machine, and the number of this task among them; None if unknown.
    """

    name: str
    started: Callable[[Environment], bool]
    place: Callable[[Environment, int], tuple[str | None, int, int]]
    tasks_here: Callable[[Environment], tuple[int, int] | None] | None = None


def recognise(environment: Environment) -> Launcher | None:
    """The launcher that started this process. None if there is none. It may ask the metadata server of a TPU VM."""
    return next((launcher for launcher in LAUNCHERS if launcher.started(environment)), None)


def from_flags(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None, environment: Environment
) -> Place | None:
    """The place that the flags of the command line give. None if none of them is given.

    Raises:
        ValueError: only some of the flags are given, or one is out of its range. `--num_processes=1` may be alone.
    """
    given = dict(zip(FLAGS, (coordinator_address, num_processes, process_id), strict=True))
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if num_processes == 1 and coordinator_address is None and not process_id:
        return _with_gpus(Place("--num_processes=1", None, 1, 0), None, environment)
    if missing:
        raise ValueError(f"explicit processes need all of {[f'--{name}' for name in given]}, missing {missing}")
    assert num_processes is not None and process_id is not None
    return _with_gpus(Place(BY_FLAGS, coordinator_address, num_processes, process_id), None, environment)


def find(environment: Environment, timeout: int) -> Place | None:
    """The place of this process, from its launcher or from ENVIRONMENT, which counts more. None if neither says it.

    Args:
        environment: the environment variables.
        timeout: seconds to wait for a service that a launcher asks.

    Raises:
        ValueError: an environment variable is missing or has a wrong value, or the launcher's service does not answer.
    """
    given = {name: environment[name] for name in ENVIRONMENT if environment.get(name)}
    address, count, index = (given.get(name) for name in ENVIRONMENT)
    if count == "1":
        return _with_gpus(Place("JAX_NUM_PROCESSES=1", None, 1, 0), None, environment)
    name, launcher = "environment variables", None
    found: tuple[str | None, int | str | None, int | str | None] = address, count, index
    if len(given) < len(ENVIRONMENT):
        try:
            launcher = recognise(environment)
            if launcher is not None:
                name = launcher.name
                of_launcher = launcher.place(environment, timeout)
                found = (address or of_launcher[0], count or of_launcher[1], index or of_launcher[2])
        except Exception as error:  # of jax's classes, of a client library, or since a value is no number
            reason = " ".join(f"{error}".split())[:200] or type(error).__name__
            who = launcher.name if launcher else "the launcher"
            raise ValueError(f"{who}: cannot find the other processes: {reason}; {OTHERWISE}") from error
        if launcher is None:
            if not given:
                return None
            missing = ", ".join(variable for variable in ENVIRONMENT if variable not in given)
            raise ValueError(f"{', '.join(given)} in the environment, no launcher was recognised, missing {missing}")
    _, count_variable, index_variable = ENVIRONMENT
    place = Place(name, found[0], _whole(count_variable, found[1]), _whole(index_variable, found[2]))
    return _with_gpus(place, launcher, environment)


def _with_gpus(place: Place, launcher: Launcher | None, environment: Environment) -> Place:
    """Adds the GPUs of this process, and checks the place. ValueError if a value is out of its range."""
    visible = visible_gpus(environment)
    gpus: tuple[int, ...] | None = None
    if ids := environment.get("JAX_LOCAL_DEVICE_IDS"):
        gpus = tuple(_whole("JAX_LOCAL_DEVICE_IDS", text) for text in ids.split(","))
    elif launcher is not None and launcher.tasks_here is not None and place.num_processes > 1:
        gpus = gpus_of_task(launcher.tasks_here(environment), visible, environment)
    return check(dataclasses.replace(place, gpus=gpus, visible_gpus=visible))


def advice(environment: Environment) -> str | None:
    """A line for a process that trains alone although its job has several tasks; None otherwise."""
    tasks = environment.get("SLURM_NTASKS", "")
    if "SLURM_JOB_ID" in environment and not _by_slurm(environment) and tasks.isdecimal() and int(tasks) > 1:
        return (
            f"warning: this SLURM job has {tasks} tasks, but srun did not start this process: it trains alone; "
            "start it with srun for all tasks"
        )
    if "KUBERNETES_SERVICE_HOST" in environment and not _by_kubernetes(environment):
        return (
            "Kubernetes: this pod is not of an indexed Job (no JOB_COMPLETION_INDEX): it trains alone; "
            "to choose otherwise, give --coordinator_address, --num_processes and --process_id"
        )
    return None


def check(place: Place) -> Place:
    """Returns `place`. ValueError if a value is out of its range."""
    if not 0 <= place.process_id < place.num_processes:
        raise ValueError(
            "--process_id must be between 0 and --num_processes - 1, got "
            f"{place.process_id} of {place.num_processes} ({place.launcher})"
        )
    if place.num_processes > 1:
        port = re.fullmatch(r"(?:[^:\s]+|\[[0-9a-fA-F:.]+\]):(\d{1,5})", place.coordinator_address or "")
        if not port or not 1 <= int(port[1]) <= 65_535:
            raise ValueError(
                f"--coordinator_address must be host:port with a port from 1 to 65535, got "
                f"{place.coordinator_address!r} ({place.launcher})"
            )
    return place


def visible_gpus(environment: Environment, root: Path = Path("/")) -> int:
    """The number of NVIDIA GPUs that this process sees."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([name for name in chosen.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])
    return len([path for path in (root / "dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal()])


def gpus_of_task(tasks: tuple[int, int] | None, visible: int, environment: Environment) -> tuple[int, ...] | None:
    """The GPUs of a task, by number among the visible ones: an equal share of them. None for all that it sees.

    Args:
        tasks: the number of tasks on this machine, and the number of this task among them; None if unknown.
        visible: the number of GPUs that this task sees.
        environment: says whether the launcher has given each task GPUs of its own. Then the task sees no others.
    """
    if tasks is None or visible == 0:
        return None
    count, index = tasks
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    has_own = "SLURM_GPUS_PER_TASK" in environment or (on_node.isdecimal() and visible < int(on_node))
    if count == 1 or visible < count or has_own:
        return None
    share = visible // count
    return tuple(range(index * share, (index + 1) * share))


def _whole(name: str, value: object) -> int:
    """A whole number from an environment variable or a launcher. ValueError otherwise."""
    if isinstance(value, int):
        return value
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value.strip()):
        return int(value)
    raise ValueError(f"{name} must be a whole number, got {value!r}")


def _port(job: int, environment: Environment) -> int:
    """The port of process 0: JAX_COORDINATOR_PORT, or one that jax, too, takes for this number of a job."""
    return int(environment.get("JAX_COORDINATOR_PORT") or 61_440 + job % 4096)


# ---- Open MPI -------------------------------------------------------------------------------------------------------


def _by_open_mpi(environment: Environment) -> bool:
    return "OMPI_COMM_WORLD_SIZE" in environment and "OMPI_COMM_WORLD_RANK" in environment


def _place_in_open_mpi(environment: Environment, timeout: int) -> tuple[str | None, int, int]:
    """Reads OMPI_MCA_orte_hnp_uri: "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", or tcp6://[fe80::1,fe80::2]:34911."""
    count, index = (int(environment[f"OMPI_COMM_WORLD_{name}"]) for name in ("SIZE", "RANK"))
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if count > 1 and not address:
        uri = environment.get("OMPI_MCA_orte_hnp_uri")
        if uri is None:
            raise ValueError(
                "since version 5 Open MPI does not say where its first process is; "
                "set JAX_COORDINATOR_ADDRESS to host:port of process 0"
            )
        read = re.match(r"(\d+)\.\d+;(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri)
        if read is None:
            raise ValueError(f"OMPI_MCA_orte_hnp_uri = {uri!r} has no address")
        host = read[2] or f"[{read[3]}]"
        address = f"{host}:{_port(int(read[1]) // 2**12, environment)}"  # job numbers are multiples of 2^12
    return address, count, index


def _tasks_of_open_mpi(environment: Environment) -> tuple[int, int] | None:
    values = [environment.get(f"OMPI_COMM_WORLD_LOCAL_{name}", "") for name in ("SIZE", "RANK")]
    return (int(values[0]), int(values[1])) if all(value.isdecimal() for value in values) else None


# ---- SLURM ----------------------------------------------------------------------------------------------------------

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def _by_slurm(environment: Environment) -> bool:
    return all(name in environment for name in _SLURM)


def _place_in_slurm(environment: Environment, timeout: int) -> tuple[str | None, int, int]:
    """Reads SLURM_STEP_NODELIST, such as "big1,gpu[003,007-015]"."""
    count = int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"])
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if count > 1 and not address:
        nodes = environment["SLURM_STEP_NODELIST"]
        read = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
        if read is None:
            raise ValueError(f"SLURM_STEP_NODELIST = {nodes!r} has no node")
        address = f"{read[1]}{read[2] or ''}:{_port(int(environment['SLURM_JOB_ID']), environment)}"
    return address, count, int(environment["SLURM_PROCID"])


def _tasks_of_slurm(environment: Environment) -> tuple[int, int] | None:
    """Reads SLURM_STEP_TASKS_PER_NODE, such as "8(x3),4"."""
    counts: list[int] = []
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    for count, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(nodes or 1)
    node = int(environment.get("SLURM_NODEID", "0"))
    if node < len(counts):
        here = counts[node]
    elif int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"]) == 1:
        here = 1
    else:
        return None
    return here, int(environment["SLURM_LOCALID"])


# ---- Cloud TPU and Kubernetes ---------------------------------------------------------------------------------------


def _by_cloud_tpu(environment: Environment) -> bool:
    from jax._src.clusters import GceTpuCluster, GkeTpuCluster

    return bool(tpu_devices()) and (GkeTpuCluster.is_env_present() or GceTpuCluster.is_env_present())


def _place_in_cloud_tpu(environment: Environment, timeout: int) -> tuple[str | None, int, int]:
    from jax._src.clusters import GceTpuCluster, GkeTpuCluster

    cluster = GkeTpuCluster if GkeTpuCluster.is_env_present() else GceTpuCluster
    count = cluster.get_process_count()
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if count > 1 and not address:
        address = cluster.get_coordinator_address(timeout, environment.get("JAX_COORDINATOR_PORT"))
    return address, count, cluster.get_process_id()


def _by_kubernetes(environment: Environment) -> bool:
    """Says whether this is a pod of an indexed Job or JobSet. Other pods have nobody to train with."""
    return "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment


def _place_in_kubernetes(environment: Environment, timeout: int) -> tuple[str | None, int, int]:
    from jax._src.clusters import K8sCluster

    if importlib.util.find_spec("kubernetes") is None:
        raise ValueError("the Python package kubernetes is not installed")
    K8sCluster.is_env_present()  # reads the pod's token
    count = K8sCluster.get_process_count()
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if count > 1 and not address:
        address = K8sCluster.get_coordinator_address(timeout, environment.get("JAX_COORDINATOR_PORT"))
    return address, count, K8sCluster.get_process_id()


LAUNCHERS = (
    Launcher("Open MPI", _by_open_mpi, _place_in_open_mpi, _tasks_of_open_mpi),
    Launcher("SLURM", _by_slurm, _place_in_slurm, _tasks_of_slurm),
    Launcher("Cloud TPU", _by_cloud_tpu, _place_in_cloud_tpu),
    Launcher("Kubernetes", _by_kubernetes, _place_in_kubernetes),
)
