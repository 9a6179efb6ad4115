"""Sections of the manuals of ten devices, and questions with the sections that answer them.

Level 1 has the words of the section, level 2 names neither device nor subject by the words of the section, and
level 3 asks for a subject of all devices, or for all subjects of a device. The rows of sections have level 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from reference_sets.draws import Draws


class Device(NamedTuple):
    """A device, what a person calls it who does not use its name, and a part of it."""

    name: str
    described: str
    part: str


class Subject(NamedTuple):
    """The text of a section on one subject, and questions about it."""

    name: str
    section: str
    direct: str
    in_other_words: str
    of_all: str


DEVICES = (
    Device("washing machine", "the appliance that does our laundry", "drum"),
    Device("dishwasher", "the appliance that washes our plates and cups", "spray arm"),
    Device("coffee machine", "the appliance that makes my espresso", "water tank"),
    Device("vacuum cleaner", "the appliance that sucks the dust off our carpet", "dust bag"),
    Device("refrigerator", "the appliance that keeps our milk cold", "glass shelf"),
    Device("oven", "the appliance that I bake bread in", "baking tray"),
    Device("printer", "the device that puts my letters on paper", "ink cartridge"),
    Device("television", "the screen that we watch films on", "remote control"),
    Device("lawn mower", "the machine that cuts our grass", "blade"),
    Device("electric toothbrush", "the device that I clean my teeth with", "brush head"),
)
SUBJECTS = (
    Subject(
        "cleaning",
        "Cleaning the {name}. Unplug the {name} and wipe it with a damp cloth, without scouring powder. Clean the "
        "{part} once a month.",
        "How do I clean the {name}?",
        "There are stains on {described}. What may I wipe them off with?",
        "Cleaning: what do the manuals of all devices advise?",
    ),
    Subject(
        "noises",
        "Noises of the {name}. A soft humming of the {name} is normal. If it is loud or rattles, look for loose "
        "screws.",
        "Which noises of the {name} are normal?",
        "Why is {described} so loud, and what can I do about the rattling?",
        "Noises: which of them are normal, for all devices?",
    ),
    Subject(
        "start",
        "If the {name} does not start. Check the plug and the fuse, and hold the main switch of the {name} for two "
        "seconds.",
        "What do I check if the {name} does not start?",
        "I press the button of {described}, and it stays dead. What now?",
        "What do I check if a device does not start, whichever it is?",
    ),
    Subject(
        "guarantee",
        "Guarantee of the {name}. Faults of material are repaired free of charge for two years from the purchase "
        "of the {name}. Keep the receipt.",
        "How long is the guarantee of the {name}?",
        "Something inside broke after 18 months. Who pays for mending {described}?",
        "How long is the guarantee of each device?",
    ),
    Subject(
        "red_light",
        "Red light of the {name}. The red light blinks if there is a fault. Count the blinks: their number is the "
        "error code of the {name}.",
        "What does the red light of the {name} mean?",
        "A small lamp flashes on {described}. How do I find out what is wrong?",
        "What does the red light mean, on any device?",
    ),
    Subject(
        "transport",
        "Transport of the {name}. Carry the {name} upright and in its box, and fix the {part} with tape before.",
        "How do I transport the {name}?",
        "We move to another flat next week. How do we take along {described}?",
        "What do the manuals say about the transport of all devices?",
    ),
    Subject(
        "energy",
        "Energy use of the {name}. The eco mode of the {name} saves a third of the energy. Standby takes less than "
        "half a watt.",
        "How much energy does the {name} save in eco mode?",
        "Our electricity bill is too high. How can {described} need less power?",
        "How do I save energy, with every device?",
    ),
    Subject(
        "spare_parts",
        "Spare parts of the {name}. A new {part} and other spare parts of the {name} can be ordered for ten years, "
        "by the number on the type plate.",
        "Where do I order spare parts of the {name}?",
        "A worn piece of {described} has to be replaced. How do I get a new piece?",
        "How are spare parts ordered, for all devices?",
    ),
    Subject(
        "disposal",
        "Disposal of the {name}. An old {name} does not belong in the household waste. Collection points take it "
        "free of charge.",
        "Where do I take an old {name} for disposal?",
        "We want to get rid of {described}. May we throw it into the dustbin?",
        "Disposal: where do I take old devices of all kinds?",
    ),
)
DIRECT, IN_OTHER_WORDS = 60, 71
"""How many questions of level 1 and 2 there are."""


def rows() -> list[dict[str, Any]]:
    """Return 240 rows: 90 sections, whose target is their own id, and 150 questions, with a list of ids."""
    pairs = [(device, subject) for device in DEVICES for subject in SUBJECTS]
    draws = Draws("retrieval")
    found = [
        _row(_id(d, s), "section", 0, s.section.format(name=d.name, part=d.part), _id(d, s)) for d, s in pairs
    ]
    for device, subject in draws.several(pairs, DIRECT):
        id_ = _id(device, subject)
        found.append(_row(f"direct:{id_}", "direct", 1, subject.direct.format(name=device.name), [id_]))
    for device, subject in draws.several(pairs, IN_OTHER_WORDS):
        id_, text = _id(device, subject), subject.in_other_words.format(described=device.described)
        found.append(_row(f"other:{id_}", "in_other_words", 2, text, [id_]))
    for subject in SUBJECTS:
        relevant = [_id(device, subject) for device in DEVICES]
        found.append(_row(f"all:{subject.name}", "all_devices", 3, subject.of_all, relevant))
    for device in DEVICES:
        relevant = [_id(device, subject) for subject in SUBJECTS]
        text = f"What is there to know about the {device.name}, from the first day to the last?"
        found.append(_row(f"all:{device.name}", "all_subjects", 3, text, relevant))
    return found


def _id(device: Device, subject: Subject) -> str:
    return f"{device.name}/{subject.name}".replace(" ", "_")


def _row(id_: str, topic: str, level: int, text: str, target: str | list[str]) -> dict[str, Any]:
    return {"id": id_.replace(" ", "_"), "topic": topic, "level": level, "text": text, "target": target}
