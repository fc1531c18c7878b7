"""What the steps of a stage may use."""

from pydantic import Field

from sensmerge.tasks.strict import Strict


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
    max_in_flight: int = Field(
        64,
        ge=1,
        description="how many steps may run at once; in task_vectors, merge and vectors, how many layer groups",
    )


class ActorPlacement(Strict):
    """The blocks of a network are shared out among workers."""

    actors: int = Field(ge=1, description="number of workers; each gets the resources of one step of the stage")
