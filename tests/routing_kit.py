"""Questions of made-up domains, for tests of routers: English and Chinese."""

from __future__ import annotations

_NUMBERS = [
    (3, 14),
    (27, 5),
    (81, 9),
    (12, 12),
    (7, 45),
    (64, 8),
    (19, 23),
    (50, 31),
    (6, 72),
    (33, 4),
    (15, 88),
    (2, 97),
]
_PARTS = ["heart", "liver", "kidney", "lung", "spine", "knee", "throat", "skin", "stomach", "brain", "eye", "ear"]
_POEMS = ["春望", "静夜思", "登高", "秋兴", "相思", "江雪", "山行", "清明", "早发", "乌衣巷", "寒食", "月夜"]

SUMS = [f"Calculate {a} {sign} {b} and give the sum." for (a, b), sign in zip(_NUMBERS, "+-*/" * 3)]
MEDICINE = [f"Which drug treats an infection of the {part} in a patient with fever?" for part in _PARTS]
POEMS = [f"请背诵唐诗《{title}》的下一句。" for title in _POEMS]
EXAMPLES = {"sums": SUMS[:9], "medicine": MEDICINE[:9], "poems": POEMS[:9]}
NEW = {"sums": SUMS[9:], "medicine": MEDICINE[9:], "poems": POEMS[9:]}
