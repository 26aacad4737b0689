"""The calls of one forward pass in which covered parameters met the batch."""

from __future__ import annotations

from torch import Tensor

from lightning_influence.core.containers import tensors_in
from lightning_influence.core.torch_private import versions
from lightning_influence.gradients.block_rows import Output, Source, Use, unknown
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.gradients.follower import Follower, Owners, name_of
from lightning_influence.gradients.trace import PathFinder
from lightning_influence.layers.blocks import LayerError, NewPathError
from lightning_influence.layers.call import Call, Layouts
from lightning_influence.layers.registry import read_call
from lightning_influence.layers.repeated import RepeatedCall
from lightning_influence.layers.site import NotUnderstoodError, Site


class ForwardUses(Follower):
    """Records them while it is active, as the trace says that they are to be read.

    Args:
        coverage: The blocks, and how their parameters are used.
        n: Number of examples; None if unknown.

    Attributes:
        uses: Block name and use, in order.
        outputs: Of the calls.
    """

    def __init__(self, coverage: Coverage, n: int | None) -> None:
        blocks = [block for name, block in coverage.blocks.items() if name not in coverage.one_by_one]
        super().__init__({name: parameter for block in blocks for name, parameter in block.parameters.items()})
        self.uses: list[tuple[str, Use]] = []
        self.outputs: list[Output] = []
        self._blocks = {name: block.name for block in blocks for name in block.parameters}
        self._paths = PathFinder(coverage.trace, n)

    def meets_batch(self, site: Site, owners: Owners) -> bool:
        """Record the call unless the batch takes no part in it, or it belongs to no example.

        Raises:
            NewPathError: If no traced path goes on like this.
            LayerError: If the call is not understood.
        """
        func, uses = site.function, []
        for name, parameter in owners.items():
            found = self._paths.next_use(func, parameter, site.output)
            if found is None:
                raise NewPathError(unknown([name], f"by {name_of(func)}"))
            uses.append(found)
        use = uses[0]
        if use.kind in ("shared", "penalty"):
            return use.kind == "penalty"
        call: Call | None
        if use.call is RepeatedCall and len(use.arguments) == len(list(tensors_in((site.args, site.kwargs)))):
            call = RepeatedCall.of(site, use.arguments)
        else:
            try:
                call = read_call(site)
            except NotUnderstoodError as error:
                raise LayerError(unknown(self._names(owners), str(error))) from None
        if call is None or use.kind == "unknown":
            raise LayerError(unknown(self._names(owners), f"by {name_of(func)}, which is not a supported function"))
        self._record(call, use.layouts, site.output)
        return True

    def _names(self, owners: Owners) -> list[str]:
        return sorted({self._blocks[name] for name in owners})

    def _record(self, call: Call, layouts: Layouts, output: Tensor) -> None:
        place = Output.of(output)
        self.outputs.append(place)
        roles: dict[str, dict[str, Source]] = {}
        for role, tensor in call.parameters.items():
            source = self.sources[id(tensor)]
            for name, _ in source.parameters:
                roles.setdefault(self._blocks[name], {})[role] = source
        for name, of_block in roles.items():
            self.uses.append((name, Use(call, layouts, place, versions(call.inputs), of_block)))
