"""Nodes that Ray's autoscaler starts as raylets on this machine, where a cloud would start machines."""

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class FakeNodes(FakeMultiNodeProvider):  # type: ignore[misc]
    """Ray's own provider of such nodes, for node types that say how much memory they have.

    The autoscaler must know it, for trials ask for memory; Ray's provider takes it for a resource of the
    user's and refuses it. The nodes find out what memory they have by themselves.
    """

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        known = {name: amount for name, amount in resources.items() if name != "memory"}
        super().create_node_with_resources_and_labels(node_config, tags, count, known, labels)
