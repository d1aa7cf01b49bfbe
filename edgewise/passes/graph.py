"""Graph surgery on an `ExportedProgram`: copy, constants, inlining, and the way back to the source line."""
from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.utils import _pytree as pytree

from edgewise.passes.trace import Traced

MADE_BY = "edgewise_pass"


class Editor:
    """An editable copy of a program's graph. `finish()` gives the program back."""

    def __init__(self, program: ExportedProgram) -> None:
        self.original = program
        self.graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        self.graph.output(self.graph.graph_copy(program.graph, copied))
        for node, copy_of_it in copied.items():
            copy_of_it.name = node.name  # a copy renames inputs that are called like a function of Python
        last = next(iter(reversed(program.graph.nodes)))
        next(iter(reversed(self.graph.nodes))).meta.update(last.meta)
        self.input_specs: list[InputSpec] = list(program.graph_signature.input_specs)
        self.constants: dict[str, Any] = dict(program.constants)
        self.added: dict[str, Tensor] = {}
        """Inputs that the caller has to feed besides the captured ones, by name, with an example each."""
        self.state_dict: dict[str, Any] = dict(program.state_dict)
        self.written: dict[str, fx.Node] = {}
        """What every run leaves in buffers that `keep` made, by their names."""
        self.dropped: set[int] = set()
        """Which of the captured inputs, counted in the order of the call, are inputs no more."""
        self.fake_mode = fake_mode_of(program)

    def add_constant(self, value: Tensor, hint: str) -> fx.Node:
        """A placeholder for a constant tensor, placed before all others."""
        name = unique(f"c_{hint}", {n.name for n in self.graph.nodes} | set(self.constants))
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(name)
        node.meta["val"] = self.fake_mode.from_tensor(value, static_shapes=True)
        self.input_specs.insert(0, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), node.name))
        self.constants[node.name] = value
        return node

    def add_input(self, hint: str, example: Tensor) -> fx.Node:
        """A new input of the program, behind the others, fed by keyword."""
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        name = unique(hint, {n.name for n in self.graph.nodes})
        with self.graph.inserting_after(placeholders[-1]):
            node = self.graph.placeholder(name)
        node.meta["val"] = self.fake_mode.from_tensor(example, static_shapes=True)
        node.meta["tensor_meta"] = _extract_tensor_metadata(node.meta["val"])  # as captured inputs have it; frontends read it
        self.input_specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None))
        self.added[node.name] = example
        return node

    def keep(self, placeholder: fx.Node, name: str, written: fx.Node) -> None:
        """Make an input a buffer, which begins with zeros, and which every run leaves as `written`."""
        given = [spec for spec in self.input_specs if spec.kind == InputKind.USER_INPUT]
        spec = next(one for one in given if one.arg.name == placeholder.name)  # type: ignore[union-attr]
        self.dropped.add(list(self.original.graph_signature.user_inputs).index(placeholder.name))
        placeholder.name = unique(f"b_{name}", {node.name for node in self.graph.nodes})  # buffers are not called as their inputs
        kept = InputSpec(InputKind.BUFFER, TensorArgument(placeholder.name), name, persistent=True)
        self.input_specs[self.input_specs.index(spec)] = kept
        self.state_dict[name] = torch.zeros(shape_of(placeholder), dtype=placeholder.meta["val"].dtype)
        output = next(node for node in reversed(self.graph.nodes) if node.op == "output")
        places = list(output.args[0])  # type: ignore[arg-type]
        output.args = ((*places[: len(self.written)], written, *places[len(self.written) :]),)
        self.written[name] = written

    def drop_constant_inputs(self) -> bool:
        """Take away the inputs that are no tensors (a flag, a size): what they decide is in the graph. Tells if there were any.

        An argument inside of a container that is no plain list, tuple or dict stays.
        """
        nodes = {n.name: n for n in self.graph.nodes if n.op == "placeholder"}
        given = [spec for spec in self.input_specs if spec.kind == InputKind.USER_INPUT]
        constant = {i for i, spec in enumerate(given) if isinstance(spec.arg, ConstantArgument)
                    and spec.arg.name in nodes and not nodes[spec.arg.name].users}
        self.dropped = constant - set(pytree.tree_leaves(_pruned(self._call_tree(), constant)))
        for i in self.dropped:
            self.input_specs.remove(given[i])
            self.graph.erase_node(nodes[given[i].arg.name])  # type: ignore[union-attr]
        return bool(self.dropped)

    def _call_tree(self) -> Any:
        """The positional and keyword arguments of the captured call, with a number for each leaf."""
        root = self.original.module_call_graph[0].signature
        assert root is not None
        return pytree.tree_unflatten(range(root.in_spec.num_leaves), root.in_spec)

    def inline(self, traced: Traced, operands: Sequence[fx.Node | None], made_by: str,
               source: fx.Node | None = None) -> Any:
        """Copy a traced function's nodes to the insertion point and give back its outputs as nodes.

        `operands` are the function's inputs in order. Tensors that the trace captured become constants.
        """
        mapping: dict[fx.Node, Any] = {}
        inputs = iter(operands)
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                mapping[node] = next(inputs)
            elif node.op == "get_attr":
                mapping[node] = self.add_constant(traced.constants[node.target].detach(), made_by)
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], lambda n: mapping[n])
            else:
                new = self.graph.node_copy(node, lambda n: mapping[n])
                new.meta[MADE_BY] = made_by
                if source is not None and "stack_trace" in source.meta:
                    new.meta["stack_trace"] = source.meta["stack_trace"]
                mapping[node] = new
        raise AssertionError("a traced graph ends in an output")

    def finish(self) -> ExportedProgram:
        """Drop what is dead and build the program. Parameters stay, as the signature names them."""
        self.graph.eliminate_dead_code(is_impure_node=_has_effect)
        used = {n.name for n in self.graph.nodes if n.op == "placeholder" and n.users}
        specs: list[InputSpec] = []
        for spec in self.input_specs:
            if spec.kind == InputKind.CONSTANT_TENSOR and spec.arg.name not in used:  # type: ignore[union-attr]
                node = next(n for n in self.graph.nodes if n.name == spec.arg.name)  # type: ignore[union-attr]
                self.graph.erase_node(node)
                self.constants.pop(str(spec.target), None)
            else:
                specs.append(spec)
        signature = copy.copy(self.original.graph_signature)
        signature = type(signature)(input_specs=specs, output_specs=self._output_specs())
        self.graph.lint()
        return ExportedProgram(
            root=self.original.graph_module, graph=self.graph, graph_signature=signature, state_dict=self.state_dict,
            range_constraints=self.original.range_constraints, module_call_graph=self._call_graph(),
            example_inputs=self._example_inputs(), constants=self.constants,
            verifiers=self.original.verifiers)

    def _call_graph(self) -> list[ModuleCallEntry]:
        """How the program is called: as before, less the dropped inputs, and with the added ones as further keyword arguments."""
        entries = list(self.original.module_call_graph)
        root = copy.copy(entries[0])
        assert root.signature is not None
        root.signature = copy.copy(root.signature)
        root.signature.outputs = [spec.arg for spec in self._output_specs() if spec.kind == OutputKind.USER_OUTPUT]
        if not self.added and not self.dropped:
            return [root, *entries[1:]]
        args, kwargs = self._call_tree()
        left, named = _pruned((args, kwargs), self.dropped)
        root.signature.in_spec = pytree.tree_structure((left, {**named, **dict.fromkeys(self.added, 0)}))
        kept = [arg for i, arg in enumerate(root.signature.inputs) if i not in self.dropped]
        root.signature.inputs = [*kept, *(TensorArgument(name) for name in self.added)]
        if names := root.signature.forward_arg_names:
            values = [*args, *kwargs.values()]
            kept_names = [name for name, value in zip(names, values, strict=True) if _pruned(value, self.dropped) is not _GONE]
            root.signature.forward_arg_names = [*kept_names, *self.added]
        return [root, *entries[1:]]

    def _example_inputs(self) -> Any:
        given = self.original.example_inputs
        if given is None or not (self.added or self.dropped):
            return given
        leaves = pytree.tree_leaves(given)
        args, kwargs = pytree.tree_map(leaves.__getitem__, _pruned(self._call_tree(), self.dropped))
        return args, {**kwargs, **self.added}

    def _output_specs(self) -> list[OutputSpec]:
        specs: list[OutputSpec] = []
        for name, written in self.written.items():
            specs.append(OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(written.name), name))
        given = output_nodes(self.graph)[len(self.written) :]
        for spec, node in zip(self.original.graph_signature.output_specs, given, strict=True):
            arg: Any = TensorArgument(node.name) if isinstance(node, fx.Node) else ConstantArgument("", node)
            specs.append(OutputSpec(spec.kind, arg, spec.target))
        return specs


_GONE = object()


def _pruned(tree: Any, leaves: set[int]) -> Any:
    """A tree of numbered leaves without some of them; `_GONE` for one of those."""
    if type(tree) is dict:
        return {k: v for k, v in ((k, _pruned(v, leaves)) for k, v in tree.items()) if v is not _GONE}
    if type(tree) in (list, tuple):
        return type(tree)(v for v in (_pruned(v, leaves) for v in tree) if v is not _GONE)
    return _GONE if type(tree) is int and tree in leaves else tree


def _has_effect(node: fx.Node) -> bool:
    """Whether a node does something besides giving a value. To torch an attention does: it might drop out at random."""
    mutable = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    return node.op in ("placeholder", "output") or mutable


def fake_mode_of(program: ExportedProgram) -> FakeTensorMode:
    """The mode that the program's `meta["val"]` belong to."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    return FakeTensorMode()


def unique(name: str, taken: Iterable[str]) -> str:
    """`name`, with a number behind it if it is taken."""
    names, number = set(taken), 0
    name = re.sub(r"\W", "_", name)
    candidate = name
    while candidate in names:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def output_nodes(graph: fx.Graph) -> list[Any]:
    """The flat outputs of a graph (nodes, or constants)."""
    node = next(n for n in reversed(graph.nodes) if n.op == "output")
    return list(node.args[0])  # type: ignore[arg-type]


def user_inputs(program: ExportedProgram) -> list[fx.Node]:
    """The placeholders that a caller feeds, in order."""
    names = set(program.graph_signature.user_inputs)
    return [n for n in program.graph.nodes if n.op == "placeholder" and n.name in names]


def parameters_of(program: ExportedProgram) -> dict[str, Tensor]:
    """Placeholder name to tensor, for all parameters, buffers and constants."""
    tensors: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            target = str(spec.target)
            tensors[spec.arg.name] = (program.state_dict[target] if target in program.state_dict  # type: ignore[union-attr]
                                      else program.constants[target])
    return tensors


def source_line(node: fx.Node) -> str:
    """`file.py:123, in forward: code` of the user's code that made a node, or an empty string."""
    trace_text = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)', trace_text)
    frames = [f for f in frames if "/torch/" not in f[0]] or frames
    if not frames:
        return ""
    path, line, function, code = frames[-1]
    short = "/".join(path.split("/")[-3:])
    return f"{short}:{line}, in {function}: {code.strip()}"


def describe(node: fx.Node) -> str:
    """A node as messages name it: its name, op and source line."""
    line = source_line(node)
    return f"node {node.name} ({node.target})" + (f" at {line}" if line else "")


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The static shape of a node's value; empty where it is no tensor."""
    value = node.meta.get("val")
    return tuple(int(n) for n in value.shape) if isinstance(value, Tensor) else ()


def ancestors(node: fx.Node) -> set[fx.Node]:
    """All nodes that a node depends on, itself included."""
    seen, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return seen


def reachable(sources: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that depend on any of `sources`, those included."""
    seen = set(sources)
    stack = list(seen)
    while stack:
        for user in stack.pop().users:
            if user not in seen:
                seen.add(user)
                stack.append(user)
    return seen
