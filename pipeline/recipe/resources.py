"""What the steps of a stage may use."""

from pydantic import Field, field_validator

from sensmerge.tasks.strict import Strict

TOUCH = 0.001
"""What Ray itself takes of the one `accelerator_type:H100`, say, of a node, for it is there or not."""


class Resources(Strict):
    """What one step of a stage may use, and how many steps may run at once."""

    num_cpus: float = Field(
        1,
        gt=0,
        description="CPU cores for one step; in task_vectors, merge and vectors, for one layer group; in calibrate, "
        "how many experts are under way at once, too",
    )
    num_gpus: float = Field(
        0,
        ge=0,
        description="GPUs for one step (in merge, for one layer group); above 0, its network or its merge runs on cuda",
    )
    accelerator_type: str | None = Field(
        None, min_length=1, description="type of the GPUs of a step's node, as Ray calls it, such as H100"
    )
    resources: dict[str, float] = Field(
        {}, description="other resources of Ray for one step, by the names that nodes were started with"
    )
    max_in_flight: int = Field(
        64,
        ge=1,
        description="how many steps may run at once; in task_vectors, merge and vectors, how many layer groups",
    )

    @field_validator("resources")
    @classmethod
    def _check_resources(cls, resources: dict[str, float]) -> dict[str, float]:
        for name, amount in resources.items():
            if name in ("CPU", "GPU"):
                raise ValueError(f"{name} is not one of the other resources; write num_{name.lower()}s")
            if amount <= 0:
                raise ValueError(f"{name} is {amount:g}; expected more than 0, or leave it out")
        return resources

    @property
    def custom(self) -> dict[str, float]:
        """What one step takes of a node beside CPUs and GPUs, by Ray's names."""
        of_type = {} if self.accelerator_type is None else {f"accelerator_type:{self.accelerator_type}": TOUCH}
        return self.resources | of_type

    @property
    def wanted(self) -> dict[str, float]:
        """All that one step takes of a node, by Ray's names."""
        usual = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        return {name: amount for name, amount in (usual | self.custom).items() if amount}


class ActorPlacement(Strict):
    """The blocks of a network are shared out among workers."""

    actors: int = Field(ge=1, description="number of workers; each gets the resources of one step of the stage")
