"""The mesh axes of a job: their sizes, this rank's coordinates, and the meshes they make."""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distclip.train.config import Parallel
from distclip.train.problem import require


@dataclass(kw_only=True, slots=True, frozen=True)
class Axes:
    """Sizes from the outermost axis to the innermost: ranks of one tensor-parallel group are neighbours.

    `shard` is the number of data-parallel ranks that share one replica, `replicate` the number of replicas; `expert`
    cuts `shard` again, for experts only.
    """

    pipeline: int
    replicate: int
    shard: int
    tensor: int
    expert: int
    rank: int

    @classmethod
    def of(cls, parallel: Parallel, world: int, rank: int = 0) -> "Axes":
        """The axes of `world` ranks; data parallelism gets what the others leave.

        Raises:
            ConfigError: the sizes do not fit.
        """
        cut = parallel.pipeline * parallel.tensor
        product = f"pipeline {parallel.pipeline} x tensor {parallel.tensor}"
        require(
            world % cut == 0, "parallel.processes", f"{world} cannot be cut into {product}: use a multiple of {cut}"
        )
        data = world // cut
        require(
            parallel.strategy != "none" or data == 1,
            "parallel.strategy",
            f"none would train {data} models that never meet: use ddp or fsdp2, or parallel.processes={cut}",
        )
        replicate = data if parallel.copies_by_fsdp2 else parallel.replicate
        require(
            data % replicate == 0,
            "parallel.replicate",
            f"{replicate} does not divide the {data} data-parallel processes",
        )
        shard = data // replicate
        require(
            shard % parallel.expert == 0,
            "parallel.expert",
            f"{parallel.expert} does not divide the {shard} data-parallel processes that shard a replica",
        )
        return cls(
            pipeline=parallel.pipeline,
            replicate=replicate,
            shard=shard,
            tensor=parallel.tensor,
            expert=parallel.expert,
            rank=rank,
        )

    @property
    def data_size(self) -> int:
        return self.replicate * self.shard

    @property
    def data_rank(self) -> int:
        """Which part of every batch this rank trains on; tensor-parallel groups and stages share one."""
        return self.rank // self.tensor % self.data_size

    def mesh(self, device: str) -> DeviceMesh:
        """`pp, dp_replicate, dp, tp` without those of size 1, but always with `dp`. All ranks call."""
        sizes = {"pp": self.pipeline, "dp_replicate": self.replicate, "dp": self.shard, "tp": self.tensor}
        return named_mesh(device, {name: size for name, size in sizes.items() if size > 1 or name == "dp"})

    def expert_mesh(self, device: str) -> DeviceMesh:
        """The same ranks with `dp` cut into `edp`, the holders of the same experts, and `ep`. All ranks call."""
        sizes = {
            "pp": self.pipeline,
            "dp_replicate": self.replicate,
            "edp": self.shard // self.expert,
            "ep": self.expert,
        }
        return named_mesh(device, {name: size for name, size in sizes.items() if size > 1 or name == "edp"})

    def __str__(self) -> str:
        """What else but data parallelism there is, such as "pipeline 2 x data 2"."""
        sizes = {"pipeline": self.pipeline, "replicate": self.replicate, "data": self.shard, "tensor": self.tensor}
        product = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        return product + (f", expert {self.expert}" if self.expert > 1 else "")

    @property
    def plain(self) -> bool:
        """Whether there is only data parallelism."""
        return self.pipeline == self.replicate == self.tensor == self.expert == 1


def named_mesh(device: str, sizes: dict[str, int]) -> DeviceMesh:
    return init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def data_mesh(mesh: DeviceMesh, last: str = "dp") -> DeviceMesh:
    """The mesh axes that data parallelism shards and replicates over."""
    names = mesh.mesh_dim_names or ()
    return mesh["dp_replicate", last] if "dp_replicate" in names else mesh[last]
