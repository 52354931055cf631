"""What the configuration parser says, in the user's words."""

import re

_KEY = re.compile(r'Parser key "([^"]+)":?')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_TYPE = re.compile(r"<class '(?:\w+\.)*(\w+)'>")
_EXPECTED = re.compile(r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|(\S+))\.?$")
_NAMES = {"NoneType": "null", "str": "text", "bool": "true or false", "float": "a number", "int": "an integer"}
_LONGEST = 700


def plain_message(error: BaseException) -> str:
    """Say in one line which key is wrong, what it got and what was expected.

    The parser reports every type that a value was tried as, inside every type of the class around it; here the
    innermost reason is kept.

    Args:
        error: jsonargparse's, from parsing or from making the classes.
    """
    text = " ".join(str(error).split())
    if "Parser key" not in text and "Union subtypes" not in text:
        return _short(_TYPE.sub(r"\1", text))
    keys = list(dict.fromkeys(_KEY.findall(text)))
    where = keys[-1] if keys and "." in keys[-1] and keys[-1].startswith(keys[0]) else ".".join(keys)
    classes = _CLASS.findall(text)
    inner = text[max((match.end() for match in (*_KEY.finditer(text), *_CLASS.finditer(text))), default=0) :]
    inner, _, got = inner.partition("Given value type:")
    value = got.partition("Given value: ")[2].split(" Parser key ")[0].split(" - Expected a ")[0]
    if not value:
        inner, _, value = inner.partition("Got value: ")
    reasons, expected = _reasons(inner)
    if len(reasons) > 1:
        # What a constructor said comes before the other types that the value is not.
        reasons = [reason for reason in reasons if not reason.startswith("Not a valid subclass")] or reasons
    if classes and len(keys) == 1 and reasons and not any(classes[-1] in reason for reason in reasons):
        reasons = [f"{classes[-1]}: {reasons[0]}", *reasons[1:]]
    said = "; ".join(reasons) if reasons else f"got {_short(value, 150).strip()!r}"
    if expected and (not reasons or reasons[0].startswith("got ")):
        said += f"; expected {' or '.join(expected[:1] if reasons else expected)}"
    of = f" of {classes[-1].rpartition('.')[2]}" if classes and len(keys) > 1 else ""
    return _short(f"{where}{of}: {said}" if where else said)


def _reasons(text: str) -> tuple[list[str], list[str]]:
    """Take the bullets apart into what was said and which types were expected."""
    text = re.sub(r"(Expected an? <class '[^']+'>)\. Got value: (\S+)", r"got '\2' - \1", text)
    listed = text.rpartition("Errors:")[2] if "Errors:" in text else text
    reasons, expected = [], []
    for part in re.split(r"(?:^|\s)-\s(?=[A-Za-z'\"])", listed):
        bullet = part.strip(" :.-")
        found = _EXPECTED.match(bullet)
        if found is not None:
            name = found[1] or found[2]
            expected.append(_NAMES.get(name, name))
        elif bullet and not bullet.startswith(("Does not validate", "Given value", "Expected a path", "Subtypes")):
            reasons.append(_TYPE.sub(r"\1", bullet))
    return list(dict.fromkeys(reasons)), list(dict.fromkeys(expected))


def _short(text: str, most: int = _LONGEST) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
