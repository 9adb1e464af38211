"""What Triton's interpreter lacks: inline PTX (the instructions of ops/triton/lanes.py, all threads at once), and
bfloat16 by rounding to nearest, where it cuts."""

import re

import numpy as np

OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]]+")
LOADED = {"u8": np.uint8, "s16": np.int16, "b32": np.uint32}
STORED = {"b16": np.uint16, "b32": np.uint32}


def install():
    """Gives the interpreter `tl.inline_asm_elementwise`, and Python's tuples in a kernel what Triton's have."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def create_inline_asm(self, text, constraints, values, *_):
        kinds = [kind.strip("=&") for kind in constraints.split(",") if kind.startswith("=")]
        return Results(interpreter, kinds, Program(interpreter, len(kinds), values).run(text))

    def convert_nearest(data, before, after, mode):
        if (before, after) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(data).view(np.uint32)
            data = ((bits + ((bits >> 16) & 1) + 0x7FFF) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        return convert(data, before, after, mode)

    interpreter._convert_float = convert_nearest
    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm
    tl.tuple.__radd__ = lambda self, other: (*other, *self.values)
    patched = set()

    def __call__(self, *args, **kwargs):
        """The language is replaced once for a file, not for each call of a function, which took most of the time."""
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = __call__


class Results:
    """What an assembly block gives back: int32 or float32 of each thread."""

    def __init__(self, interpreter, kinds, registers):
        import triton.language as tl

        types = {"r": (tl.int32, np.int32), "f": (tl.float32, np.float32)}
        self.handles = [
            interpreter.TensorHandle(np.ascontiguousarray(register).view(types[kind][1]), types[kind][0])
            for kind, register in zip(kinds, registers, strict=True)
        ]

    def get_result(self, i):
        return self.handles[i]


class Program:
    """Registers `$0`, `$1` and so on, and the block's own; 32 bits a thread, addresses 64."""

    def __init__(self, interpreter, outputs, values):
        self.memory, self.outputs = interpreter._interpreter, outputs
        self.registers = {f"${outputs + i}": np.atleast_1d(value.data) for i, value in enumerate(values)}
        self.shape = np.broadcast_shapes(*(value.shape for value in self.registers.values()))

    def run(self, text):
        text = text.strip()
        for line in text[1:-1].split(";") if text.startswith("{") else text.split(";"):
            if line.strip() and not line.strip().startswith(".reg"):
                self.step(line.strip())
        return [self.registers[f"${i}"] for i in range(self.outputs)]

    def step(self, line):
        guard, line = line.split(None, 1) if line.startswith("@") else ("", line)
        live = np.ones(self.shape, bool)
        if guard:
            live = self.registers[guard.strip("@!")] ^ guard.startswith("@!")
        name, rest = line.split(None, 1)
        targets, *sources = OPERAND.findall(rest)
        if name.startswith("st"):
            return self.st(name.split("."), live, targets, *sources)
        names = OPERAND.findall(targets.strip("{}"))
        results = getattr(self, name.split(".")[0])(name.split("."), live, len(names), *sources)
        if name.startswith("bar"):
            return
        for target, result in zip(names, results, strict=True):
            before = self.registers.get(target, np.zeros_like(result))
            self.registers[target] = np.where(live, result, before)

    def word(self, name):
        """A register or a constant as 32 bits a thread."""
        value = self.registers[name] if name in self.registers else np.int64(int(name, 0))
        if value.dtype == np.float32:
            return np.broadcast_to(value, self.shape)
        return np.broadcast_to(value.astype(np.int64) & 0xFFFFFFFF, self.shape).astype(np.uint32)

    def words(self, names):
        return [self.word(name) for name in OPERAND.findall(names.strip("{}"))]

    def ld(self, name, live, count, address):
        kind = np.dtype(LOADED[name[-1]])
        first = self.address(address, kind.itemsize * count, live)
        return [self.load(first + np.uint64(i * kind.itemsize), live, kind) for i in range(count)]

    def address(self, text, multiple, live):
        at, _, offset = text.strip("[]").partition("+")
        first = np.broadcast_to(self.registers[at.strip()], self.shape).astype(np.uint64) + np.uint64(int(offset or 0))
        assert not (first[live] % np.uint64(multiple)).any(), "misaligned"
        return first

    def load(self, address, live, kind):
        found = self.memory.load(address, live, np.zeros(self.shape, kind), kind)
        return found.astype(np.int64).astype(np.uint32)

    def st(self, name, live, address, source):
        value = self.word(source).astype(STORED[name[-1]])
        self.memory.store(self.address(address, value.itemsize, live), value, live)

    def bar(self, *_):
        return ()

    def mov(self, name, live, count, source):
        return [self.word(source)]

    def setp(self, name, live, count, a, b, c=None):
        compare = {"eq": np.equal, "ne": np.not_equal, "gt": np.greater}[name[1]]
        found = compare(self.word(a).view(np.int32), self.word(b).view(np.int32))
        return [found & self.registers[c] if c else found]

    def __getattr__(self, name):
        return {"and": lambda _, live, count, a, b: [self.word(a) & self.word(b)]}[name]

    def prmt(self, name, live, count, a, b, selector):
        both = np.stack([self.word(a), self.word(b)], -1).view(np.uint8)
        result = np.zeros((*self.shape, 4), np.uint8)
        for i in range(4):
            nibble = (self.word(selector) >> (4 * i)) & 15
            byte = np.take_along_axis(both, (nibble & 7)[..., None].astype(np.int64), -1)[..., 0]
            result[..., i] = np.where(nibble & 8, (byte >> 7) * 255, byte)
        return [result.view(np.uint32)[..., 0]]

    def fma(self, name, live, count, a, b, c):
        x, y, z = (np.ascontiguousarray(self.word(r)).view(np.float16).astype(np.float64) for r in (a, b, c))
        return [(x * y + z).astype(np.float16).view(np.uint32)]

    def mma(self, name, live, count, a, b, c):
        """m16n8k16 of one warp: the fragments as ops/triton/lanes.py says."""
        lane = np.arange(32)
        g, t = lane // 4, 2 * (lane % 4)
        left, right, total = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
        for i, word in enumerate(self.words(a)):
            pair = np.ascontiguousarray(word).view(np.float16).reshape(32, 2)
            left[g + 8 * (i % 2), t + 8 * (i // 2)], left[g + 8 * (i % 2), t + 1 + 8 * (i // 2)] = pair.T
        for i, word in enumerate(self.words(b)):
            pair = np.ascontiguousarray(word).view(np.float16).reshape(32, 2)
            right[t + 8 * i, g], right[t + 1 + 8 * i, g] = pair.T
        places = [(g + 8 * (i // 2), t + i % 2) for i in range(4)]
        for place, word in zip(places, self.words(c), strict=True):
            total[place] = word
        total += left @ right
        return [total[place].astype(np.float32) for place in places]
