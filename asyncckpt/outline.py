"""The keys of a step as people read them: subtrees with their sums, and one line for layers that are alike.

Pure. A key is cut at its dots: `model.layers.0.attn.wq` lies below `model.layers.0`. Called by the command line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice

from asyncckpt.lookup import Saved

MAX_DEPTH = 60
"""Of the tree: a key that somebody made of a million dots is cut so often."""


@dataclass(slots=True)
class Node:
    """A subtree, or one value (`saved`). name: one part of a key, or several where there was nothing between them.
    num_bytes, num_values, num_chunks: of all below."""

    name: str
    saved: Saved | None = None
    children: dict[str, Node] = field(default_factory=dict)
    num_bytes: int = 0
    num_values: int = 0
    num_chunks: int = 0

    def add(self, saved: Saved) -> None:
        self.num_bytes += saved.num_bytes
        self.num_values += 1
        self.num_chunks += saved.num_chunks


@dataclass(frozen=True, slots=True)
class Line:
    """One of an outline. depth: 0 for what stands outermost. count: of the subtrees or values that it stands for, all
    alike; the node is the first of them. num_left_out: of siblings for which this one stands, unlike each other."""

    depth: int
    name: str
    node: Node
    count: int = 1
    num_left_out: int = 0


def tree(values: Iterable[Saved]) -> Node:
    """All of them below a node without a name."""
    root = Node("")
    for saved in values:
        node = root
        node.add(saved)
        for part in saved.key.split(".", MAX_DEPTH):
            child = node.children.get(part)
            if child is None:
                child = node.children[part] = Node(part)
            node = child
            node.add(saved)
        node.saved = saved
    return root


@dataclass(frozen=True, slots=True)
class Outliner:
    """Makes outlines of one tree. collapse: subtrees whose names are numbers in a row become one line where they are
    alike in all but the values. most: lines for siblings; one more stands for the rest."""

    root: Node
    collapse: bool = True
    most: int | None = None
    _numbers: dict[object, int] = field(default_factory=dict)
    _signatures: dict[int, int] = field(default_factory=dict)

    def lines(self, depth: int | None = None) -> list[Line]:
        """Down to `depth` levels."""
        return list(self._below(self.root, 0, depth))

    def fitting(self, num_lines: int) -> list[Line]:
        """The deepest outline of at most `num_lines`; of one level if none is that short."""
        best = self.lines(1)
        for depth in count(2):
            lines = list(islice(self._below(self.root, 0, depth), num_lines + 1))
            if len(lines) > num_lines or len(lines) == len(best):
                return best
            best = lines
        raise AssertionError

    def _below(self, node: Node, level: int, depth: int | None) -> Iterator[Line]:
        num_left = len(node.children)
        for number, group in enumerate(self._groups(node)):
            if number == self.most:
                yield Line(level, "...", group[0], num_left_out=num_left)
                return
            num_left -= len(group)
            name, first, num_alike = self._joined(group)
            yield Line(level, name, first, num_alike)
            if depth is None or level + 1 < depth:
                yield from self._below(first, level + 1, depth)

    def _joined(self, group: list[Node]) -> tuple[str, Node, int]:
        """(name, first node, how many) of a group, and of the only one below it for as long as there is only one."""
        names, num_alike = [], 1
        while True:
            first, last = group[0], group[-1]
            names.append(first.name if first is last else f"{first.name}..{last.name}")
            num_alike *= len(group)
            groups = list(islice(self._groups(first), 2))
            if first.saved is not None or len(groups) != 1:
                return ".".join(names), first, num_alike
            (group,) = groups

    def _groups(self, node: Node) -> Iterator[list[Node]]:
        """Runs of children that are alike."""
        group: list[Node] = []
        for child in _in_order(node):
            if group and not self._is_one_more(group[-1], child):
                yield group
                group = []
            group.append(child)
        if group:
            yield group

    def _is_one_more(self, before: Node, node: Node) -> bool:
        return (
            self.collapse
            and before.name.isdecimal()
            and node.name.isdecimal()
            and int(node.name) == int(before.name) + 1
            and self._signature(before) == self._signature(node)
        )

    def _signature(self, node: Node) -> int:
        """Equal for what is alike; each is found once."""
        if (known := self._signatures.get(id(node))) is not None:
            return known
        saved = node.saved
        own = None if saved is None else (saved.shape, saved.dtype, saved.num_chunks)
        parts = tuple((name, self._signature(child)) for name, child in node.children.items())
        found = self._signatures[id(node)] = self._numbers.setdefault((own, parts), len(self._numbers))
        return found


def _in_order(node: Node) -> list[Node]:
    """Numbers by value, where all are; else as they were saved."""
    children = list(node.children.values())
    if all(child.name.isdecimal() for child in children):
        children.sort(key=lambda child: int(child.name))
    return children
