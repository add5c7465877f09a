"""The ranks that take part: named axes, their sizes, and group names that are equal on every rank.

A ``ProcessGroup``'s own name is a counter that differs between runs and can differ between ranks. Graphs, cache keys
and agreement hashes hold *logical* names instead: the axis itself where it spans the whole world (``"dp"``), and
otherwise the axis and a digest of the mesh (``"dp@1f0c9ab2"``), under which each rank registers its own subgroup.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dscompile.errors import ConfigError
from dscompile.torch_compat import is_registered, mesh_of_groups, register_group, unflattened, whole_world

DATA = "dp"
"""The axis over which ZeRO shards, and over whose ranks batches differ."""


@dataclass(frozen=True)
class World:
    """Named axes of a device mesh. Equal on every rank, so it may be part of a cache key.

    Attributes:
        axes: the mesh's dimension names, outermost first.
        sizes: ranks along each axis.
        groups: logical name of the process group of each axis.
        device: the mesh's device type, ``"cpu"`` or ``"cuda"``.
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: tuple[str, ...]
    device: str

    @classmethod
    def of(cls, mesh: DeviceMesh) -> World:
        """Describe a mesh, and register its groups under their logical names.

        Raises:
            ConfigError: a mesh whose dimensions have no names, or that has more ranks than the process group.
        """
        if mesh.mesh_dim_names is None:
            raise ConfigError(
                f"the mesh {mesh} has no axis names; pass mesh_dim_names to init_device_mesh, "
                f"e.g. init_device_mesh({mesh.device_type!r}, {tuple(mesh.shape)}, mesh_dim_names=({DATA!r},))."
            )
        axes = tuple(mesh.mesh_dim_names)
        sizes = tuple(int(n) for n in mesh.shape)
        ranks = mesh.mesh.flatten().tolist()
        grid = columns_of(mesh) > 1
        if grid:
            _revive(mesh, axes[0].removesuffix(_ROWS), sizes)
            axes, sizes = (axes[0].removesuffix(_ROWS),), (sizes[0] * sizes[1],)
        if len(ranks) > dist.get_world_size() or max(ranks) >= dist.get_world_size():
            raise ConfigError(
                f"the mesh has ranks {ranks}, but the process group has {dist.get_world_size()}; "
                "launch as many processes as the mesh has ranks."
            )
        digest = hashlib.sha256(repr((axes, sizes, ranks)).encode()).hexdigest()[:8]
        whole = len(axes) == 1 and ranks == list(range(dist.get_world_size()))
        groups = axes if whole else tuple(f"{axis}@{digest}" for axis in axes)
        for axis, group in zip(axes, groups, strict=True):
            register_group(group, whole_world() if grid else mesh.get_group(axis))
        return cls(axes, sizes, groups, mesh.device_type)

    def _index(self, axis: str) -> int:
        if axis not in self.axes:
            raise ConfigError(f"the mesh has no axis {axis!r}; its axes are {', '.join(self.axes)}.")
        return self.axes.index(axis)

    def size(self, axis: str = DATA) -> int:
        """Ranks along an axis. Raises :class:`ConfigError` if the mesh has no such axis."""
        return self.sizes[self._index(axis)]

    def group(self, axis: str = DATA) -> str:
        """Logical group name of an axis. Raises :class:`ConfigError` if the mesh has no such axis."""
        return self.groups[self._index(axis)]


# -- ranks in a grid -------------------------------------------------------------------------------------------------

_ROWS, _COLUMNS = ":rows", ":columns"


def _grid_axes(axis: str) -> tuple[str, str]:
    return axis + _ROWS, axis + _COLUMNS


def can_be_grid(mesh: DeviceMesh) -> bool:
    """Whether :func:`as_grid` may arrange a mesh's ranks: it has one axis, over the whole world."""
    return mesh.ndim == 1 and mesh.mesh.tolist() == list(range(dist.get_world_size()))


def columns_of(mesh: DeviceMesh) -> int:
    """Columns of a mesh that :func:`as_grid` made, 1 for any other."""
    names = mesh.mesh_dim_names or ()
    return int(mesh.shape[1]) if len(names) == 2 and names == _grid_axes(names[0].removesuffix(_ROWS)) else 1


def as_grid(mesh: DeviceMesh, axis: str, columns: int) -> DeviceMesh:
    """The ranks of a one-axis mesh over the whole world, in the same order, as rows of ``columns``.

    :class:`World` sees the one axis all the same. Every rank must call it: the first call makes process groups, later
    ones find them under their logical names, as meshes do that are unpickled in another process.
    """
    sizes, axes = (mesh.size() // columns, columns), _grid_axes(axis)
    groups = _grid_groups(axis, sizes)
    if not all(map(is_registered, groups)):
        made = unflattened(mesh, axis, sizes, axes)
        for name, part in zip(groups, axes, strict=True):
            register_group(name, made.get_group(part))
    return mesh_of_groups(mesh.device_type, mesh.mesh.view(sizes), axes, groups)


def _grid_groups(axis: str, sizes: tuple[int, ...]) -> tuple[str, str]:
    """The logical names of a grid's groups."""
    rows, columns = _grid_axes(f"{axis}@{sizes[0]}x{sizes[1]}")
    return rows, columns


def _revive(mesh: DeviceMesh, axis: str, sizes: tuple[int, ...]) -> None:
    """Make the groups of a grid that was unpickled where no grid has been made yet. Every rank comes here."""
    if not all(map(is_registered, _grid_groups(axis, sizes))):
        as_grid(init_device_mesh(mesh.device_type, (mesh.size(),), mesh_dim_names=(axis,)), axis, sizes[1])


def default_mesh(device: str = "cpu", expected: int | None = None) -> DeviceMesh:
    """A one-axis mesh over all ranks of the default process group, which ``torchrun``'s variables may start.

    Raises:
        ConfigError: no process group and no launcher, or not ``expected`` ranks.
    """
    if not dist.is_initialized() and not dist.is_torchelastic_launched():
        raise ConfigError(
            "distribute() needs a process group: launch with torchrun, or call torch.distributed.init_process_group() "
            "first."
        )
    if not dist.is_initialized():
        dist.init_process_group()
    size = dist.get_world_size()
    if expected is not None and expected != size:
        raise ConfigError(f"the configuration asks for {expected} ranks, but {size} were launched.")
    return init_device_mesh(device, (size,), mesh_dim_names=(DATA,))
