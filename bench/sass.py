"""What compiled code says about itself: SASS and PTX. Text in, facts out.

The hot loop is found on the control-flow graph, not by address: compilers put the retry of every
barrier wait behind the end of the kernel, and one kernel holds many loops. A loop is natural (its
header dominates its back edge). Counted is what one trip issues when no wait has to retry: the
cheapest way through the body, and every branch that holds matrix instructions or loads. The rest, such
as the epilogue of a persistent kernel whose loops were fused, is ``conditional``.

Read with ``nvdisasm -c`` as Triton 3.6.0 (CUDA 12.8) and 3.9.0 (CUDA 13.1) bundle it.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

WARP_SIZE = 32
WARP_GROUP = 4

_SASS_LINE = re.compile(r"^/\*([0-9a-f]{4,})\*/\s+(.*)$")
_SASS_TEXT = re.compile(r"(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*)")
_SASS_SCHEDULE = re.compile(r"\s+[&?][\w={},]+")
"""What ``nvdisasm`` 12.8 appends to sm_120 instructions: "&req={1} ?trans5"."""
_SASS_LABEL = re.compile(r"`\(([^)]+)\)")
_BRANCH_TARGETS = re.compile(r'BRANCH_TARGETS ([^"]*)')
_PTX_TABLE = re.compile(r"(\w+):\s*\.branchtargets([^;]*);")
_PTX_TEXT = re.compile(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)")

_JUMPS = {"BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU", "bra", "brx"}
_ENDS = {"EXIT", "RET", "KILL", "ret", "exit"}
_WAITS = {"SYNCS", "NANOSLEEP", "USETMAXREG", "UTCATOMSWS", "mbarrier", "nanosleep", "setmaxnreg"}
_SPIN_LIMIT = 16
"""A wait retries in a loop of a handful of instructions; a loop that works is longer."""

_MATRIX = re.compile(r"(?:UTC)?[A-Z]G?MMA\b|(?:tcgen05\.mma|wgmma\.mma_async|mma\.sync)\b")
_LOADS = re.compile(
    r"(?:LDG|LD|LDGSTS|UTMALDG|UBLKCP)\b|ld\.global|ld\.volatile\.global"
    r"|cp\.async\.(?:ca|cg)|cp\.async\.bulk\.(?:tensor\.[^ ]*)?shared"
)
_WORK = re.compile(f"{_MATRIX.pattern}|{_LOADS.pattern}")
_GROUP_SHAPE = re.compile(r"^[A-Z]GMMA\.(\d+)x(\d+)x(\d+)")
_WARP_SHAPE = re.compile(r"^[A-Z]MMA\.(?:SF\.)?(16)(8)(\d+)\b")

OPCODE_CLASSES: dict[str, re.Pattern[str]] = {
    name: re.compile(pattern)
    for name, pattern in {
        "matrix": r"(UTC)?[A-Z]G?MMA$",
        "global": r"LDG$|STG|LDGSTS|LD$|ST$|RED|ATOMG?$|UTMA|UBLK|CCTL|PREFETCH",
        "spill": r"LDL|STL",
        "shared": r"LDS|STS|ATOMS|LDT|STT|UTCCP|UTCBAR|UTCSHIFT",
        "convert": r"F2|I2|FRND",
        "float": r"F(ADD|MUL|FMA|MNMX|SEL|SET|CHK|SWZ)|H(ADD|MUL|FMA|MNMX|SET)|MUFU|D(ADD|MUL|FMA|SETP)",
        "sync": r"BAR|SYNCS|DEPBAR|LDGDEPBAR|WARPGROUP|WARPSYNC|MEMBAR|FENCE|ERRBAR|ARRIVES|NANOSLEEP|ELECT|VOTE"
        r"|USETMAXREG|UCGABAR|ACQBULK|B2R|R2B|ENDCOLL",
        "control": r"BRA|BRX|BSSY|BSYNC|BREAK|EXIT|CALL|RET|JMP|JMX|KILL|YIELD|NOP|BPT|BMOV",
        "move": r"MOV|SHFL|R2UR|S2|CS2R|R2P|P2R|UMOV|LDC|ULDC|LEPC|REDUX",
        "uniform": r"U[A-Z]",
        "integer": r"IADD|IMAD|IMUL|IMNMX|IABS|LOP|PRMT|SHF|SHL|SHR|LEA|SEL|ISET|VI|SGXT|BMSK|BREV|FLO|POPC|PLOP|IDP",
    }.items()
}
"""A base opcode's class is the first whose pattern matches its start; "other" without any."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: full opcode ("IMAD.MOV.U32"), its predicate, where it may go."""

    opcode: str
    predicate: str
    operands: str
    targets: tuple[str, ...]

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction can follow. ``BRA.U UP0, `(.L)`` is conditional without a predicate."""
        if self.base in _ENDS:
            return bool(self.predicate)
        if self.base in _JUMPS:
            bare = re.fullmatch(r"`\([^)]+\)|\$\w+", self.operands)
            return bool(self.predicate) or (not bare and self.base in ("BRA", "JMP"))
        return self.base != "BSYNC" or not self.targets


@dataclass
class Code:
    """One function: its instructions, and the index each label stands before."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Loop:
    """What one trip of a loop issues, per warp that runs it.

    Attributes:
        start: index of the header's first instruction in the function.
        instructions: those of the cheapest way through the body, and of all branches with matrix
            instructions or loads; a wait does not retry.
        conditional: the others of the body.
        opcodes: how often each base opcode is among ``instructions``; ``matrix``: each matrix
            instruction, by its full name.
        loads: loads from global memory, by any unit.
        inner: instructions that belong to loops inside this one, counted once each.
        calls: calls, whose callee is not counted.
    """

    start: int
    instructions: int
    conditional: int
    opcodes: dict[str, int]
    matrix: dict[str, int]
    loads: int
    inner: int = 0
    calls: int = 0

    @property
    def num_matrix(self) -> int:
        return sum(self.matrix.values())

    @property
    def is_pipelined(self) -> bool:
        """Whether it loads into shared memory ahead of time."""
        return any(base in self.opcodes for base in ("LDGSTS", "UTMALDG", "UBLKCP", "cp"))

    @property
    def classes(self) -> dict[str, int]:
        """Instructions per opcode class, most first."""
        counts: Counter[str] = Counter()
        for opcode, count in self.opcodes.items():
            counts[opcode_class(opcode)] += count
        return dict(counts.most_common())

    def matrix_flops(self) -> float | None:
        """Matrix flops one warp adds per trip; None where an instruction's name hides its shape (tcgen05)."""
        flops = [(warp_flops(name), count) for name, count in self.matrix.items()]
        return None if any(each is None for each, _ in flops) else sum((each or 0) * count for each, count in flops)


def opcode_class(base: str) -> str:
    return next((name for name, pattern in OPCODE_CLASSES.items() if pattern.match(base)), "other")


def warp_flops(name: str) -> float | None:
    """Flops of one matrix instruction per warp that issues it, from its name; a warp group shares its own."""
    if shape := _GROUP_SHAPE.match(name):
        return 2.0 * math.prod(map(int, shape.groups())) / WARP_GROUP
    if shape := _WARP_SHAPE.match(name):
        return 2.0 * math.prod(map(int, shape.groups()))
    return None


def parse_sass(text: str, function: str) -> Code:
    """``function`` of ``nvdisasm -c`` output; what it calls in the same section comes behind it.

    Raises:
        ValueError: no such function.
    """
    code, inside, joins = Code(), False, {}
    for raw in text.splitlines():
        line = raw.strip()
        if line.split()[:1] == [".section"]:
            inside = line.split()[1].split(",")[0] == f".text.{function}"
        elif inside and line.endswith(":") and not line.startswith("/"):
            code.labels[line[:-1]] = len(code.instructions)
        elif inside and (found := _SASS_LINE.match(line)) and (parts := _SASS_TEXT.match(found[2].split(";")[0])):
            predicate, opcode, operands = parts[1] or "", parts[2], _SASS_SCHEDULE.sub("", parts[3]).strip()
            listed = _BRANCH_TARGETS.search(operands)
            targets = tuple(listed[1].split(",")) if listed else tuple(_SASS_LABEL.findall(operands))
            base = opcode.split(".")[0]
            if base == "BSSY":  # names where its BSYNC goes
                joins[operands.split(",")[0]], targets = targets, ()
            elif base == "BSYNC":
                targets = joins.get(operands, ())
            elif base in ("CALL", "RET"):
                targets = ()
            code.instructions.append(Instruction(opcode, predicate, operands, targets))
    if not code.instructions:
        raise ValueError(f"function: expected one in the SASS; got {function!r}")
    return code


def parse_ptx(text: str, function: str) -> Code:
    """The entry ``function`` of a PTX file. Labels of inline assembly (the retries of waits) are no labels here.

    Raises:
        ValueError: no such entry.
    """
    found = re.search(rf"\.entry {re.escape(function)}\(", text)
    if not found:
        raise ValueError(f"function: expected an entry in the PTX; got {function!r}")
    code, depth, began = Code(), 0, False
    tables = {name: re.findall(r"\$\w+", rows) for name, rows in _PTX_TABLE.findall(text)}
    for raw in text[found.end() :].splitlines():
        line = raw.split("//")[0].strip()
        depth += line.count("{") - line.count("}")
        began = began or depth > 0
        if began and not depth:
            break
        if re.fullmatch(r"\$\w+:", line):
            code.labels[line[:-1]] = len(code.instructions)
            continue
        for part in re.split(r"[;{}]", line):
            if (parts := _PTX_TEXT.fullmatch(part.strip())) and not part.strip().endswith(":"):
                listed = [
                    target for name, rows in tables.items() if re.search(rf"\b{name}$", parts[3]) for target in rows
                ]
                targets = tuple(listed or re.findall(r"\$L\w+", parts[3]))
                if parts[2].startswith("bra") and not targets:
                    continue
                code.instructions.append(Instruction(parts[2], parts[1] or "", parts[3], targets))
    return code


class _Graph:
    """Basic blocks of one function, their dominators and natural loops."""

    def __init__(self, code: Code) -> None:
        self.code = code
        instructions = code.instructions
        leaders = {0, *code.labels.values()}
        leaders |= {i + 1 for i, each in enumerate(instructions) if each.targets or not each.falls_through}
        starts = sorted(leader for leader in leaders if leader < len(instructions))
        self.ranges = list(zip(starts, [*starts[1:], len(instructions)], strict=True))
        block_at = {start: block for block, start in enumerate(starts)}
        self.successors: list[set[int]] = []
        for block, (_, stop) in enumerate(self.ranges):
            last = instructions[stop - 1]
            goes = {block_at[code.labels[t]] for t in last.targets if code.labels.get(t, len(instructions)) in block_at}
            if last.falls_through and block + 1 < len(self.ranges):
                goes.add(block + 1)
            self.successors.append(goes)
        self.predecessors: list[set[int]] = [set() for _ in self.ranges]
        for block, goes in enumerate(self.successors):
            for successor in goes:
                self.predecessors[successor].add(block)
        self.reachable = self._reach({0}, self.successors)
        self.dominators = self._dominators()

    @staticmethod
    def _reach(start: set[int], edges: list[set[int]], within: set[int] | None = None) -> set[int]:
        seen, todo = set(start), list(start)
        while todo:
            new = {block for block in edges[todo.pop()] if within is None or block in within} - seen
            seen |= new
            todo += new
        return seen

    def _dominators(self) -> dict[int, set[int]]:
        dominators = {block: set(self.reachable) for block in self.reachable}
        dominators[0] = {0}
        changed = True
        while changed:
            changed = False
            for block in sorted(self.reachable - {0}):
                known = [dominators[each] for each in self.predecessors[block] & self.reachable]
                new = set.intersection(*known) | {block}
                if new != dominators[block]:
                    dominators[block], changed = new, True
        return dominators

    def natural_loops(self) -> dict[int, set[int]]:
        """Header to body of every natural loop; loops of one header are one."""
        bodies: dict[int, set[int]] = {}
        for block in self.reachable:
            for header in self.successors[block] & self.dominators[block]:
                tail = self._reach({block}, self.predecessors, self.reachable - {header})
                bodies.setdefault(header, {header}).update(tail - {header} if block != header else ())
        return bodies

    def of(self, blocks: Iterable[int]) -> list[Instruction]:
        return [each for block in sorted(blocks) for each in self.code.instructions[slice(*self.ranges[block])]]

    def is_spin(self, body: set[int]) -> bool:
        """A loop that only waits, or (padding behind the code) only jumps."""
        inside = self.of(body)
        works = any(_WORK.match(each.opcode) for each in inside)
        waits = any(each.base in _WAITS for each in inside)
        return not works and ((waits and len(inside) <= _SPIN_LIMIT) or all(each.base in _JUMPS for each in inside))

    def without_retries(self, header: int, body: set[int], spins: list[set[int]]) -> set[int]:
        """The body less every wait loop that a trip can pass by, and less what only leads there or back."""
        kept = set(body)
        for spin in spins:
            rest = kept - spin
            tails = self.predecessors[header] & rest
            if header in rest and tails & self._reach({header}, self.successors, rest):
                kept = rest
        tails = (self.predecessors[header] & kept) or kept
        forward = self._reach({header}, self.successors, kept)
        backward = self._reach(tails, self.predecessors, kept)
        return forward & backward

    def cheapest_way(self, header: int, blocks: set[int]) -> set[int]:
        """The blocks of the way from the header to a back edge that issues least."""
        tails = self.predecessors[header] & blocks
        heap: list[tuple[int, list[int]]] = [(0, [header])]
        seen: set[int] = set()
        while heap:
            cost, way = heapq.heappop(heap)
            if way[-1] in tails:
                return set(way)
            seen.add(way[-1])
            for block in (self.successors[way[-1]] & blocks) - seen:
                start, stop = self.ranges[block]
                heapq.heappush(heap, (cost + stop - start, [*way, block]))
        return blocks

    def summary(self, header: int, blocks: set[int], inner: set[int], is_loop: bool = True) -> Loop:
        works = {block for block in blocks if any(_WORK.match(each.opcode) for each in self.of([block]))}
        counted = self.cheapest_way(header, blocks) | works if is_loop else blocks
        inside = self.of(counted)
        return Loop(
            start=self.ranges[header][0],
            instructions=len(inside),
            conditional=len(self.of(blocks - counted)),
            opcodes=dict(Counter(each.base for each in inside).most_common()),
            matrix=dict(Counter(each.opcode for each in inside if _MATRIX.match(each.opcode)).most_common()),
            loads=sum(bool(_LOADS.match(each.opcode)) for each in inside),
            inner=len(self.of(inner & counted)),
            calls=sum(each.base in ("CALL", "call") for each in inside),
        )


def loops(code: Code) -> list[Loop]:
    """The loops that work: innermost ones, and those with a matrix instruction that hold no other such loop."""
    graph = _Graph(code)
    bodies = graph.natural_loops()
    spins = [body for body in bodies.values() if graph.is_spin(body)]
    working = {header: body for header, body in bodies.items() if body not in spins}
    found = []
    for header, body in working.items():
        inner = [other for head, other in working.items() if head != header and other < body]
        held = [graph.summary(0, other, set()).num_matrix for other in inner]
        retries = [spin for spin in spins if spin < body]
        kept = graph.without_retries(header, body, retries)
        loop = graph.summary(header, kept, set[int]().union(*inner))
        if not inner or (loop.matrix and not any(held)):
            found.append(loop)
    return sorted(found, key=lambda loop: loop.start)


def straight_line(code: Code) -> Loop:
    """The whole function as one trip: what a kernel without a loop issues."""
    graph = _Graph(code)
    spins = [body for body in graph.natural_loops().values() if graph.is_spin(body)]
    return graph.summary(0, graph.reachable.difference(*spins), set(), is_loop=False)


def matrix_instructions(code: Code) -> dict[str, int]:
    """Every matrix instruction of the function by its full name, most frequent first."""
    return dict(Counter(each.opcode for each in code.instructions if _MATRIX.match(each.opcode)).most_common())


def hot_loop(found: list[Loop]) -> Loop | None:
    """The loop with the most matrix work, or without such the most loads; of equals a pipelined one, then the longest.

    A kernel may hold its loop twice, for whole tiles with loads ahead of time, and for the few that need a mask.
    """
    if any(loop.matrix for loop in found):
        flops = [loop.matrix_flops() for loop in found]
        known = all(each is not None for each in flops)
        work = [(each or 0) if known else loop.num_matrix for each, loop in zip(flops, found, strict=True)]
    else:
        work = [loop.loads for loop in found]
    order = [(done, loop.is_pipelined, loop.instructions, loop.start) for done, loop in zip(work, found, strict=True)]
    return max(zip(order, found, strict=True), key=lambda row: row[0])[1] if any(work) else None
