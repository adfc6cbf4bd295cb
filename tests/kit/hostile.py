"""Names that a file of a stranger might hold; none may lead out of its folder, nor be a file there at all."""

from __future__ import annotations

HOSTILE: list[str] = [
    *["../a", "a/../../b", "/etc/passwd", "..", ".", "", "a//b", "./a", "a/.", "a/..", "//a", "a/", "\\\\host\\a"],
    *["..\\a", "C:\\a", "C:a", "a\x00b", "a\nb", "a\x7f", "\u202egnp", "~/a", "~root/a", "a*", "a?", "a<b", "a>b"],
    *["a|b", 'a"b', " a", "a ", "a./b", "a .", "\ta", "a\r", "\ud800", "a" * 300, "..%2f\x1b", "\u2028", "\xa0"],
    *["..../", ".../a", "con:", "file:///etc", "a/../a", "sub/../../x", "\x01", "/", "\\", "a\\b", "…/\x00"],
    *["..;/a:", "\u200b\u200e"],
]
