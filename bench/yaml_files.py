"""YAML as users write it: no key twice, and no few characters that fill the memory or the stack."""
import yaml

DEEPEST = 50            # levels of lists and mappings; the C parser's own limit is the stack's end
LARGEST = 10 ** 6       # values that one may stand for


def load(text: str, loader=None):
    """The value of a YAML document. Raises ValueError or YAMLError, with the line where it can.

    loader: a kind of Loader that knows tags of its own.
    """
    depth, loader = 0, loader or Loader
    for event in yaml.parse(text, loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"line {event.start_mark.line + 1}: over {DEEPEST} levels deep")
    return yaml.load(text, loader)


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):     # the C one is ten times faster
    """PyYAML's, which takes no key twice, and no few lines that stand for millions."""

    def get_single_node(self):
        node = super().get_single_node()
        self.check(node, {})
        return node

    def check(self, node, known: dict) -> int:
        """How many values it stands for, those behind a `*name` each time that it is named.

        known: of nodes seen before. Raises ValueError for a key that is there twice.
        """
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if id(node) not in known:
            known[id(node)] = LARGEST                   # a name within what it names has no end
            parts = node.value
            if isinstance(node, yaml.MappingNode):
                self.check_keys(node)
                parts = [part for pair in node.value for part in pair]
            known[id(node)] = 1 + sum(self.check(part, known) for part in parts)
        if known[id(node)] >= LARGEST:
            raise ValueError(f"line {node.start_mark.line + 1}: stands for over {LARGEST} values")
        return known[id(node)]

    def check_keys(self, node) -> None:
        seen = set()
        for key_node, _ in node.value:
            # Lists are no keys anyway; `<<: *name` may give what another line changes.
            if isinstance(key_node, yaml.ScalarNode) and not key_node.tag.endswith(":merge"):
                key = self.construct_object(key_node)
                if key in seen:
                    raise ValueError(f"line {key_node.start_mark.line + 1}: the key {key} is there "
                                     "twice")
                seen.add(key)
