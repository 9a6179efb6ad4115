"""Messages to a shop, each about one of six matters.

Level 1 names the matter, level 2 says it in other words, and level 3 also mentions another matter, about which
it says that nothing is wanted.
"""

from __future__ import annotations

from typing import Any

from reference_sets.draws import Draws

ITEMS = (
    "desk lamp",
    "kettle",
    "coffee grinder",
    "wall clock",
    "fan heater",
    "toaster",
    "radio",
    "blender",
    "hair dryer",
    "vacuum cleaner",
    "keyboard",
    "sewing machine",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
FRAMES = (
    "{}",
    "Hello! {}",
    "{} Thank you.",
    "Good morning. {}",
    "{} Best wishes",
    "Dear team, a message: {}",
)
EACH = (14, 14, 12)
"""Rows of each class, by level."""
TOPICS = ("plain", "in_other_words", "with_distraction")
MESSAGES: dict[str, tuple[tuple[str, ...], ...]] = {
    "billing": (
        (
            "I was charged twice for the {item}.",
            "Please send me the invoice for order {n}.",
            "My card payment for order {n} was declined. How else can I pay?",
            "The invoice for order {n} shows the wrong amount.",
            "Can I pay for order {n} by bank transfer?",
        ),
        (
            "My bank statement shows {more} euros for order {n}, but the price was {less} euros.",
            "For my bookkeeping I need a document with your tax number, for order {n}.",
            "The discount code was accepted, yet you took the full price for the {item}.",
            "Two identical amounts went off my credit card on {day} for one {item}.",
            "Our company needs the receipt for the {item} in its own name.",
        ),
        (
            "The {item} arrived on time and works well. Only the amount on the bill is higher than agreed.",
            "I can log in without problems, but I see that the {item} was debited two times.",
            "I keep the {item}, it is lovely. What I need is a corrected invoice.",
            "The parcel is here, thank you. Why did you debit {more} euros when the {item} cost {less}?",
        ),
    ),
    "delivery": (
        (
            "Where is my parcel with the {item}?",
            "When will order {n} be delivered?",
            "The tracking of parcel {n} has not changed for a week.",
            "Please deliver the {item} to my neighbour.",
            "My parcel {n} has not arrived yet.",
        ),
        (
            "I have been waiting for the {item} since {day}; it should have been here by now.",
            "The courier says that nobody was at home on {day}, but I was in all day waiting for the {item}.",
            "Can the driver leave the {item} in the garage on {day}?",
            "Order {n} is on its way. Can the van still bring it to my office instead of my home?",
            "Somebody signed for the {item} on {day}, but nobody here has it.",
        ),
        (
            "I have paid the invoice for the {item} already. It has not reached me though: where is it?",
            "I know that the {item} is the right one for me, I need no advice. On which day will it come?",
            "I can log in, but the page does not show where the van with the {item} is today.",
            "I do not want to send the {item} back, I simply want to know when it gets here.",
        ),
    ),
    "return": (
        (
            "I want to send the {item} back.",
            "How do I return order {n}?",
            "Please exchange the {item} for a larger one.",
            "I would like to return the {item}; I have changed my mind.",
            "Please send me a return label for the {item}.",
        ),
        (
            "The {item} does not match my furniture. How do I get it back to you?",
            "I have bought the {item} in blue, but now I prefer green. Can I swap it?",
            "The {item} is too large for our flat, so we do not want to keep it.",
            "I was given two of the {item} as presents and need only one. Will you take the other?",
            "I unpacked the {item} on {day} and do not like it. Until when can I give it back?",
        ),
        (
            "The {item} came quickly and works, but I do not like the colour and would like to give it back.",
            "Nothing is broken. The {item} is just too small, so I would like to swap it for the larger model.",
            "The bill for the {item} is right. I do not need it any more: where do I send it?",
            "Your advice before I bought the {item} was good, but it does not suit me. I want to send it back.",
        ),
    ),
    "account": (
        (
            "I forgot my password.",
            "How do I change the email address of my account?",
            "I cannot log in to my account since {day}.",
            "Please delete my account.",
            "My account is locked since {day}.",
        ),
        (
            "When I try to sign in, the page keeps saying that my user name is unknown.",
            "I have married, and in my profile my last name is still the old one.",
            "The code for signing in never reaches my phone.",
            "Someone else may know the secret word that I use for your website. What should I do?",
            "I have a new phone number since {day}. Where do I enter it in my profile?",
        ),
        (
            "I wanted to look at the {item}, but I am not let in: it says that my password is wrong.",
            "My parcel with the {item} is here. Now please remove my profile from your website.",
            "The invoice for the {item} is fine. But the page no longer accepts my user name when I sign in.",
            "The {item} works. My problem is that I cannot sign in any more since {day}.",
        ),
    ),
    "defect": (
        (
            "The {item} is broken.",
            "The {item} does not work.",
            "My new {item} is faulty.",
            "The {item} stopped working on {day}.",
            "There is a crack in the {item}.",
        ),
        (
            "I pressed the switch of the {item}, and nothing happens.",
            "Since {day} the {item} gets so hot that it smells burnt.",
            "The {item} makes a grinding noise and then turns itself off.",
            "A piece fell off the {item} when I used it on {day}.",
            "After ten minutes the {item} goes dead every time.",
        ),
        (
            "The parcel came a day early, but the {item} in it does not turn on.",
            "The invoice for the {item} was right, and I have paid it. After a week the {item} fails.",
            "I do not want to return the {item}. I want to know how to repair it: it no longer turns on.",
            "Your advice before I bought the {item} was good, and still it broke on {day}.",
        ),
    ),
    "advice": (
        (
            "Which {item} do you recommend? I want to buy one.",
            "I may buy the {item}. Is it suitable for children?",
            "What is the difference between your two models of the {item}? I have not decided yet.",
            "How much does the {item} weigh? I am thinking of buying it.",
            "Before I buy the {item}: is there a white one?",
        ),
        (
            "I have not ordered yet. Would the {item} fit on a shelf that is 20 cm deep?",
            "I am looking for a quiet {item} for a small flat. Which one would you take?",
            "How long is the cable of the {item}? I may order one.",
            "Can the {item} be used in a country with 110 volts? I have not bought it yet.",
            "I am thinking about the {item} as a present. Does it need batteries?",
        ),
        (
            "A friend sent her {item} back because it was loud. Before I order one: is the new model quieter?",
            "My old {item} from another shop broke. Which of yours should I buy?",
            "I can log in and everything. Before I spend {more} euros: does the {item} have a timer?",
            "Delivery and payment are clear to me. What I want to know before I order: how large is the {item}?",
        ),
    ),
}


def rows() -> list[dict[str, Any]]:
    """Return 240 rows: 40 of each of 6 classes, and no text twice."""
    found: list[dict[str, Any]] = []
    for label, levels in MESSAGES.items():
        for level, (messages, count) in enumerate(zip(levels, EACH, strict=True), 1):
            draws = Draws(f"classification {label} {level}")
            texts: dict[str, None] = {}
            while len(texts) < count:
                texts.setdefault(_text(draws, messages[len(texts) % len(messages)]))
            topic = TOPICS[level - 1]
            found += [
                {"id": f"{label}-{topic}-{i}", "topic": topic, "level": level, "text": text, "label": label}
                for i, text in enumerate(texts, 1)
            ]
    return found


def _text(draws: Draws, message: str) -> str:
    less = draws.number(20, 60)
    message = message.format(
        item=draws.one(ITEMS),
        day=draws.one(DAYS),
        n=draws.number(10_000, 99_999),
        less=less,
        more=less + draws.number(5, 30),
    )
    return draws.one(FRAMES).format(message)
