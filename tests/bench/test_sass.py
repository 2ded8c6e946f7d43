"""The reader of SASS, PTX and tool output, on short listings whose counts are plain to see."""

from __future__ import annotations

import pytest
from tokenfab.bench import sass, tool_logs


def listing(body: str, function: str = "kernel", label: str = ".L") -> str:
    """``nvdisasm -c`` output around ``body``: a line that ends in ":" is a label, any other an instruction."""
    head = [
        '\t.elftype\t@"ET_EXEC"',
        "",
        f"//--------------------- .text.{function}          --------------------------",
        f'\t.section\t.text.{function},"ax",@progbits',
        '\t.sectionflags\t@"SHF_BARRIERS=1"',
        "\t.align\t128",
        f"        .global         {function}",
        f"{function}:",
        f".text.{function}:",
    ]
    lines, address = [], 0
    for raw in body.strip().splitlines():
        line = raw.strip()
        if line.startswith(label) and line.endswith(":"):
            lines.append(line)
        elif line:
            lines.append(f"        /*{address:04x}*/              {line:<40} ;")
            address += 16
    return "\n".join([*head, *lines, '\t.section\t.nv.shared.kernel,"aw",@nobits', ""])


def loops(body: str) -> list[sass.Loop]:
    return sass.loops(sass.parse_sass(listing(body), "kernel"))


SIMPLE = """
    MOV R1, c[0x0][0x28]
.L_x_0:
    LDG.E.128 R4, desc[UR4][R2.64]
    PRMT R8, R4, 0x7531, R5
    @P1 IADD3 R2, P0, R2, 0x10, RZ
    HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    @P0 BRA `(.L_x_0)
    STG.E desc[UR4][R2.64], R24
    EXIT
.L_x_1:
    BRA `(.L_x_1)
    NOP
"""


def test_a_loop_is_what_lies_between_its_label_and_its_branch_back() -> None:
    (loop,) = loops(SIMPLE)
    assert (loop.start, loop.instructions, loop.conditional, loop.inner, loop.calls) == (1, 6, 0, 0, 0)
    assert loop.opcodes == {"LDG": 1, "PRMT": 1, "IADD3": 1, "HGMMA": 1, "WARPGROUP": 1, "BRA": 1}
    assert loop.matrix == {"HGMMA.64x16x16.F32.BF16": 1}
    assert loop.num_matrix == 1
    assert loop.loads == 1
    assert loop.classes == {"global": 1, "integer": 2, "matrix": 1, "sync": 1, "control": 1}
    # 64 x 16 x 16 multiply-adds, shared by the four warps of the group
    assert loop.matrix_flops() == 2 * 64 * 16 * 16 / 4


def test_instructions_keep_opcode_predicate_and_target() -> None:
    code = sass.parse_sass(listing(SIMPLE), "kernel")
    assert len(code.instructions) == 11
    add, branch = code.instructions[3], code.instructions[6]
    assert (add.opcode, add.base, add.predicate, add.targets) == ("IADD3", "IADD3", "P1", ())
    assert (branch.opcode, branch.predicate, branch.targets) == ("BRA", "P0", (".L_x_0",))
    assert code.instructions[1].opcode == "LDG.E.128"
    assert code.labels[".L_x_0"] == 1


def test_only_the_asked_function_is_read() -> None:
    text = listing("EXIT", "other") + listing(SIMPLE, "kernel") + listing("NOP\nEXIT", "kernel_2")
    assert len(sass.parse_sass(text, "kernel").instructions) == 11
    assert [each.opcode for each in sass.parse_sass(text, "other").instructions] == ["EXIT"]
    with pytest.raises(ValueError, match=r"^function: expected one in the SASS; got 'kern'$"):
        sass.parse_sass(text, "kern")


def test_of_nested_loops_the_innermost_with_matrix_work_is_found() -> None:
    (loop,) = loops("""
        .L_x_0:
            S2R R0, SR_CTAID.X
            MOV R1, RZ
        .L_x_1:
            HMMA.16816.F32.BF16 R24, R4, R8, R24
            ISETP.NE.AND P0, PT, R1, R2, PT
            @P0 BRA `(.L_x_1)
            STG.E desc[UR4][R2.64], R24
            @P1 BRA `(.L_x_0)
            EXIT
    """)
    assert (loop.start, loop.instructions) == (2, 3)
    assert loop.matrix_flops() == 2 * 16 * 8 * 16


def test_an_inner_loop_without_matrix_work_is_part_of_the_loop_that_has_it_and_stands_alone_too() -> None:
    found = loops("""
        .L_x_0:
            HMMA.16816.F32.BF16 R24, R4, R8, R24
        .L_x_1:
            IADD3 R1, R1, 0x1, RZ
            @P0 BRA `(.L_x_1)
            MOV R3, R4
            @P1 BRA `(.L_x_0)
            EXIT
    """)
    assert [(each.start, each.instructions, each.inner, each.num_matrix) for each in found] == [
        (0, 5, 2, 1),
        (1, 2, 0, 0),
    ]


RETRY = """
.L_x_0:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R4
    @!P0 BRA `(.L_x_1)
.L_x_2:
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24
    @P1 BRA `(.L_x_0)
    EXIT
.L_x_1:
    MOV R9, RZ
    MOV R9, RZ
.L_x_3:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R4
    @!P0 BRA `(.L_x_3)
    BRA `(.L_x_2)
.L_x_4:
    BRA `(.L_x_4)
"""


def test_retries_of_a_wait_behind_the_end_of_the_kernel_are_not_counted() -> None:
    (loop,) = loops(RETRY)
    assert (loop.start, loop.instructions, loop.conditional) == (0, 4, 0)
    assert loop.opcodes == {"SYNCS": 1, "BRA": 2, "HGMMA": 1}


def test_a_wait_that_every_trip_passes_is_counted_once() -> None:
    (loop,) = loops("""
        .L_x_0:
            MOV R1, R2
        .L_x_1:
            SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R4
            @!P0 BRA `(.L_x_1)
            HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24
            @P1 BRA `(.L_x_0)
            EXIT
    """)
    assert (loop.instructions, loop.conditional) == (5, 0)


def test_a_long_loop_that_waits_is_a_loop_that_works() -> None:
    body = "\n".join(["FADD R1, R1, R2"] * 20)
    (loop,) = loops(f".L_x_0:\nSYNCS.ARRIVE [UR4], R4\n{body}\n@P0 BRA `(.L_x_0)\nEXIT")
    assert loop.instructions == 22


def test_a_short_loop_that_waits_and_loads_is_a_loop_that_works() -> None:
    (loop,) = loops("""
        .L_x_0:
            SYNCS.ARRIVE.TRANS64 RZ, [R5+UR22], R2
            UTMALDG.2D [UR16], [UR10]
            @P0 BRA `(.L_x_0)
            EXIT
    """)
    assert (loop.instructions, loop.loads) == (3, 1)


ELECTED = """
.L_x_0:
    MOV R1, R2
    {skip}
    UTCHMMA gdesc[UR4], gdesc[UR8], tmem[UR7], tmem[UR16], idesc[UR17], !UPT
    UTCBAR [UR4], URZ
.L_x_1:
    IADD3 R1, R1, 0x1, RZ
    {back}
    EXIT
"""


@pytest.mark.parametrize("skip", ["@P2 BRA `(.L_x_1)", "BRA.U !UP0, `(.L_x_1)", "BRA.DIV UR4, `(.L_x_1)"])
@pytest.mark.parametrize("back", ["@P0 BRA `(.L_x_0)", "BRA.U UP1, `(.L_x_0)"])
def test_a_branch_around_matrix_work_is_counted(skip: str, back: str) -> None:
    (loop,) = loops(ELECTED.format(skip=skip, back=back))
    assert (loop.instructions, loop.conditional) == (6, 0)
    assert loop.matrix == {"UTCHMMA": 1}
    assert loop.matrix_flops() is None


def test_a_branch_without_matrix_work_or_loads_is_conditional_and_of_two_the_cheaper_counts() -> None:
    (loop,) = loops("""
        .L_x_0:
            HMMA.16816.F32.BF16 R24, R4, R8, R24
            @P2 BRA `(.L_x_1)
            FADD R1, R1, R2
            FADD R1, R1, R2
            FADD R1, R1, R2
            FADD R1, R1, R2
            BRA `(.L_x_2)
        .L_x_1:
            FMUL R1, R1, R2
        .L_x_2:
            @P0 BRA `(.L_x_0)
            EXIT
    """)
    assert (loop.instructions, loop.conditional) == (4, 5)
    assert loop.opcodes == {"HMMA": 1, "BRA": 2, "FMUL": 1}


def test_a_branch_with_loads_is_counted() -> None:
    (loop,) = loops("""
        .L_x_0:
            HMMA.16816.F32.BF16 R24, R4, R8, R24
            @P2 BRA `(.L_x_1)
            LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64]
            LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64]
        .L_x_1:
            @P0 BRA `(.L_x_0)
            EXIT
    """)
    assert (loop.instructions, loop.conditional, loop.loads) == (5, 0, 2)


def test_nothing_follows_an_unconditional_branch_or_exit() -> None:
    # falling through either would make the code behind it part of a loop
    assert (
        loops("""
        .L_x_0:
            MOV R1, R2
            @P0 BRA `(.L_x_1)
            EXIT
            BRA `(.L_x_0)
        .L_x_1:
            HMMA.16816.F32.BF16 R24, R4, R8, R24
            RET.REL.NODEC R2 `(kernel)
            BRA `(.L_x_0)
    """)
        == []
    )


def test_a_predicated_exit_may_stay() -> None:
    (loop,) = loops(".L_x_0:\nHMMA.16816.F32.BF16 R4, R4, R8, R4\n@P0 EXIT\nBRA `(.L_x_0)")
    assert loop.instructions == 3


def test_scheduling_marks_are_no_operands() -> None:
    # as nvdisasm of CUDA 12.8 prints sm_120
    (loop,) = loops("""
        .L_x_0:
            QMMA.16832.F32.E4M3.E4M3 R4, R8, R12, R4   &req={1,0} &rd=0x2  ?WAIT12_END_GROUP
            @P1 BRA `(.L_x_1)           ?trans5
            BSSY B0, `(.L_x_2)          ?trans2
            BSYNC B0                    ?trans5
        .L_x_2:
            @P0 BRA `(.L_x_0)           &req={1}    ?trans10
            BRA `(.L_x_3)               ?trans5
            MOV R1, R2                  ?trans1
        .L_x_1:
            BRA `(.L_x_0)               ?trans6
        .L_x_3:
            EXIT                        ?trans5
    """)
    # back over .L_x_1 is the cheaper way; "MOV" comes after an unconditional branch
    assert (loop.instructions, loop.conditional) == (3, 3)
    assert loop.matrix == {"QMMA.16832.F32.E4M3.E4M3": 1}


def test_a_barrier_sync_goes_where_its_barrier_says() -> None:
    (loop,) = loops("""
        .L_x_0:
            BSSY.RECONVERGENT B0, `(.L_x_2)
            BSSY B1, `(.L_x_3)
            HMMA.16816.F32.BF16 R24, R4, R8, R24
            BSYNC.RECONVERGENT B0
            FADD R1, R1, R2
        .L_x_2:
            @P0 BRA `(.L_x_0)
        .L_x_3:
            EXIT
    """)
    assert loop.opcodes == {"BSSY": 2, "HMMA": 1, "BSYNC": 1, "BRA": 1}


def test_a_jump_table_goes_to_every_target() -> None:
    text = """
        MOV R4, R5
        BRX R4 -0x2590     (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)
    .L_x_1:
        HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24
        @P0 BRA `(.L_x_1)
        EXIT
    .L_x_2:
        UTMALDG.2D [UR16], [UR10]
        MOV R1, R2
        @P0 BRA `(.L_x_2)
        EXIT
    """
    assert [(each.instructions, each.num_matrix, each.loads) for each in loops(text)] == [(2, 1, 0), (3, 0, 1)]
    assert loops(text.replace(",.L_x_2", ""))[-1].num_matrix == 1


def test_calls_are_told() -> None:
    (loop,) = loops("""
        .L_x_0:
            HMMA.16816.F32.BF16 R24, R4, R8, R24
            CALL.REL.NOINC `($__internal_0_$helper)
            @P0 BRA `(.L_x_0)
            EXIT
            $__internal_0_$helper:
            FADD R1, R1, R2
            RET.REL.NODEC R2 `(kernel)
    """)
    assert (loop.instructions, loop.calls) == (3, 1)


def test_straight_line_code_is_all_that_can_be_reached_without_retries() -> None:
    code = sass.parse_sass(
        listing("MOV R1, R2\nLDG.E R4, [R2.64]\n@P0 EXIT\nSTG.E [R2.64], R4\nEXIT\nNOP\nNOP"), "kernel"
    )
    whole = sass.straight_line(code)
    assert (whole.instructions, whole.loads, whole.conditional) == (5, 1, 0)
    assert sass.loops(code) == []
    waits = sass.straight_line(sass.parse_sass(listing(RETRY), "kernel"))
    assert waits.opcodes == {"SYNCS": 1, "BRA": 3, "HGMMA": 1, "EXIT": 1, "MOV": 2}


def loop_of(instructions: int, matrix: dict[str, int], loads: int = 0) -> sass.Loop:
    return sass.Loop(0, instructions, 0, {}, matrix, loads)


def test_the_hot_loop_does_the_most_matrix_work() -> None:
    small, large = {"HMMA.16816.F32.BF16": 8}, {"HGMMA.64x256x16.F32.BF16": 2}
    few, many = loop_of(900, small, 9), loop_of(10, large)
    assert sass.hot_loop([few, many]) is many  # flops, not instructions
    assert sass.hot_loop([many, few]) is many
    assert sass.hot_loop([loop_of(1, {"UTCHMMA": 2}), few]) is few  # a shape unknown: instructions
    short, long = loop_of(10, large), loop_of(11, large)
    assert sass.hot_loop([long, short]) is long
    assert sass.hot_loop([short, long]) is long
    ahead = sass.Loop(0, 9, 0, {"LDGSTS": 2}, large, 2)
    assert sass.hot_loop([ahead, long]) is ahead  # the other one is for the tiles that need a mask
    assert sass.hot_loop([ahead, sass.Loop(0, 8, 0, {"LDGSTS": 2}, {"HGMMA.64x256x16.F32.BF16": 3}, 2)]) is not ahead


def test_without_matrix_work_the_hot_loop_loads_the_most() -> None:
    one, two = loop_of(50, {}, 1), loop_of(10, {}, 2)
    assert sass.hot_loop([one, two, loop_of(99, {})]) is two
    assert sass.hot_loop([loop_of(99, {})]) is None
    assert sass.hot_loop([]) is None
    assert sass.hot_loop([loop_of(9, {"HMMA.16816.F32": 1}), two]) is not two


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("HGMMA.64x256x16.F32.BF16", 2 * 64 * 256 * 16 / 4),
        ("QGMMA.64x64x32.F32.E4M3.E4M3", 2 * 64 * 64 * 32 / 4),
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("QMMA.16832.F32.E4M3.E4M3", 2 * 16 * 8 * 32),
        ("OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X", 2 * 16 * 8 * 64),
        ("UTCOMMA.4X", None),
        ("DMMA.8x8x4", None),
    ],
)
def test_flops_of_a_matrix_instruction_per_warp(name: str, flops: float | None) -> None:
    assert sass.warp_flops(name) == flops


def test_matrix_flops_of_a_loop_are_unknown_with_one_shape_unknown() -> None:
    assert loop_of(1, {"HMMA.16816.F32.BF16": 3}).matrix_flops() == 3 * 4096
    assert loop_of(1, {"HMMA.16816.F32.BF16": 3, "UTCHMMA": 1}).matrix_flops() is None
    assert loop_of(1, {}).matrix_flops() == 0


@pytest.mark.parametrize(
    ("name", "opcodes"),
    [
        ("matrix", "HGMMA QGMMA HMMA QMMA OMMA IMMA UTCHMMA UTCQMMA UTCOMMA"),
        ("global", "LDG STG LDGSTS UTMALDG UTMASTG UBLKCP LD ST RED ATOM ATOMG CCTL"),
        ("spill", "LDL STL"),
        ("shared", "LDS LDSM STS STSM ATOMS LDTM STTM UTCCP UTCBAR"),
        ("convert", "F2F F2FP F2I I2F I2FP"),
        ("float", "FADD FMUL FFMA HMUL2 HADD2 HFMA2 MUFU FSETP FMNMX"),
        ("sync", "BAR SYNCS DEPBAR LDGDEPBAR WARPGROUP WARPSYNC MEMBAR FENCE ELECT USETMAXREG"),
        ("control", "BRA BRX BSSY BSYNC EXIT CALL RET NOP"),
        ("move", "MOV SHFL R2UR S2R S2UR CS2R LDC LDCU ULDC UMOV"),
        ("uniform", "UIADD3 USEL ULEA UISETP USHF"),
        ("integer", "IADD IADD3 IMAD LOP3 PRMT SHF LEA SEL ISETP VIADD VIMNMX SGXT"),
        ("other", "XYZZY"),
    ],
)
def test_opcode_classes(name: str, opcodes: str) -> None:
    assert {opcode: sass.opcode_class(opcode) for opcode in opcodes.split()} == dict.fromkeys(opcodes.split(), name)


PTX = """
.version 8.7
.target sm_100a
.visible .entry other(
	.param .u64 p0
)
.reqntid 256
{
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 	{%r1, %r2}, {%r3}, {%r4}, {%r5};
	ret;
}
	// .globl	kernel
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 128
{
	.reg .pred 	%p<9>;
	.loc	1 3 0                           // file.py:3:0
$L__func_begin0:
JTI0_0:
	.branchtargets
		$L__BB0_2,
		$L__BB0_5;
// %bb.0:
	mov.u32 	%r1, %tid.x;
	brx.idx 	%r12, JTI0_0;
	mov.u32 	%r1, %tid.y;
$L__BB0_2:                              // =>This Inner Loop Header: Depth=1
	// begin inline asm
	{
	.reg .pred complete;
waitLoop:
	mbarrier.try_wait.parity.shared.b64 complete, [%r1], %r2;
	@!complete bra.uni waitLoop;
	}
	// end inline asm
	// begin inline asm
	cp.async.cg.shared.global [ %r20 + 0 ], [ %rd21 + 0 ], 0x10, %r12;
	// end inline asm
	@%p1 tcgen05.mma.cta_group::1.kind::mxf4.block_scale.block32 [ %r1 + 0 ], %rd1, %rd2, %r4, [%r5], [%r6], %p2;
	@%p8 bra 	$L__BB0_2;
	bra.uni 	$L__BB0_6;
$L__BB0_5:
	ld.global.v4.b32 	{%r1, %r2, %r3, %r4}, [%rd1];
	@!%p8 bra 	$L__BB0_5;
$L__BB0_6:
	ret;
$L__func_end0:
}
	.section	.debug_abbrev
	{
.b8 1
	}
"""


def test_ptx_loops_and_matrix_instructions() -> None:
    code = sass.parse_ptx(PTX, "kernel")
    name = "tcgen05.mma.cta_group::1.kind::mxf4.block_scale.block32"
    assert sass.matrix_instructions(code) == {name: 1}
    first, second = sass.loops(code)
    assert (first.instructions, first.matrix, first.loads) == (4, {name: 1}, 1)
    assert (second.instructions, second.matrix, second.loads) == (2, {}, 1)
    assert sum(sass.matrix_instructions(sass.parse_ptx(PTX, "other")).values()) == 1
    with pytest.raises(ValueError, match=r"^function: expected an entry in the PTX; got 'kern'$"):
        sass.parse_ptx(PTX, "kern")


USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function kernel_2:
  REG:9 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:1 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function kernel:
  REG:255 STACK:64 SHARED:1024 LOCAL:8 CONSTANT[2]:16 CONSTANT[0]:592 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_resource_usage() -> None:
    usage = tool_logs.resource_usage(USAGE, "kernel")
    assert {name: usage[name] for name in ("REG", "STACK", "SHARED", "LOCAL", "CONSTANT[0]")} == {
        "REG": 255, "STACK": 64, "SHARED": 1024, "LOCAL": 8, "CONSTANT[0]": 592,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"^function: expected one in the resource usage; got 'kern'$"):
        tool_logs.resource_usage(USAGE, "kern")


LOG = """
ptxas-blackwell warning : Too many maxnreg specified for entry kernel, will be ignored
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : 0 bytes gmem
ptxas info    : Function properties for helper
    0 bytes stack frame, 1 bytes spill stores, 2 bytes spill loads
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    64 bytes stack frame, 68 bytes spill stores, 60 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 64 bytes cumulative stack size
"""


def test_spills_and_warnings_of_the_ptxas_log() -> None:
    assert tool_logs.spills(LOG, "kernel") == (68, 60)
    assert tool_logs.spills(LOG, "helper") == (1, 2)
    assert tool_logs.ptxas_warnings(LOG) == (
        "Too many maxnreg specified for entry kernel, will be ignored",
        "(C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized",
    )
    with pytest.raises(ValueError, match=r"^log: expected the spills of 'kern'; got "):
        tool_logs.spills(LOG, "kern")
