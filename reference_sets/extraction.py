"""Orders in different texts, each with the object to extract.

Level 1 is a form or a list, level 2 is prose, and level 3 has other dates, numbers or names beside those of the
order, which the text itself marks as wrong or as somebody else's. Items, names and cities are written as they
are to be extracted; dates are written in words or as numbers that can be read in one way only.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta
from typing import Any

from reference_sets.draws import Draws

FIRST = (
    "Amara",
    "Bruno",
    "Clara",
    "Dmitri",
    "Elif",
    "Femi",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Keiko",
    "Liam",
)
LAST = (
    "Abel",
    "Berg",
    "Costa",
    "Duarte",
    "Ekström",
    "Fischer",
    "Gupta",
    "Haddad",
    "Ito",
    "Jansen",
    "Kowalski",
)
CITIES = ("Lisbon", "Oslo", "Nairobi", "Kyoto", "Lyon", "Porto", "Graz", "Ghent", "Turin", "Leeds", "Quito")
ITEMS = (
    "desk lamp",
    "oak shelf",
    "water bottle",
    "garden hose",
    "wool blanket",
    "coffee grinder",
    "bicycle pump",
    "picture frame",
    "camping stove",
    "steel kettle",
    "door mat",
    "wall clock",
    "reading chair",
    "rain jacket",
)
WORDS = (
    "",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
EACH = 30
"""Rows of each topic."""

Order = dict[str, Any]


def rows() -> list[dict[str, Any]]:
    """Return 240 rows: 8 topics of 30 rows, and no text twice."""
    found: list[dict[str, Any]] = []
    for topic, (level, write) in TOPICS.items():
        draws = Draws(f"extraction {topic}")
        texts: dict[str, Order] = {}
        while len(texts) < EACH:
            order = _order(draws)
            texts.setdefault(write(draws, order), order)
        found += [
            {"id": f"{topic}-{i}", "topic": topic, "level": level, "text": text, "answer": order}
            for i, (text, order) in enumerate(texts.items(), 1)
        ]
    return found


def _order(draws: Draws) -> Order:
    return {
        "customer": f"{draws.one(FIRST)} {draws.one(LAST)}",
        "city": draws.one(CITIES),
        "item": draws.one(ITEMS),
        "quantity": draws.number(2, 12),
        "unit_price": draws.number(4, 90) + draws.one((0, 0.25, 0.5, 0.75, 0.9)),
        "delivery_date": _day(draws).isoformat(),
        "gift": draws.number(0, 1) == 1,
    }


def _form(draws: Draws, order: Order) -> str:
    wrapped = "yes" if order["gift"] else "no"
    return (
        f"Customer: {order['customer']}\nCity: {order['city']}\nItem: {order['item']}\n"
        f"Quantity: {order['quantity']}\nUnit price: {_price(order)}\n"
        f"Delivery date: {order['delivery_date']}\nGift: {wrapped}"
    )


def _line(draws: Draws, order: Order) -> str:
    wrapped = "gift" if order["gift"] else "no gift"
    return (
        f"{order['delivery_date']} | {order['quantity']} x {order['item']} | {_price(order)} each | "
        f"{order['customer']}, {order['city']} | {wrapped}"
    )


def _email(draws: Draws, order: Order) -> str:
    hello = draws.one(("Hello,", "Good morning,", "Dear team,"))
    wish = (
        "It is a gift, so please wrap it." if order["gift"] else "It is not a gift, so no wrapping is needed."
    )
    return (
        f'{hello}\n\nI would like to order {order["quantity"]} units of the item "{order["item"]}" at '
        f"{_price(order)} per unit. Please deliver to {order['city']} on {_in_words(order)}. {wish}\n\n"
        f"Kind regards\n{order['customer']}"
    )


def _note(draws: Draws, order: Order) -> str:
    caller = order["customer"]
    wish = "wants it as a gift" if order["gift"] else "does not want it as a gift"
    return (
        f"Phone note: {caller} called from {order['city']} and ordered {WORDS[order['quantity']]} of our item "
        f'"{order["item"]}", to be delivered there on {_in_words(order)}. We agreed on {_price(order)} for '
        f"each. The customer {wish}."
    )


def _chat(draws: Draws, order: Order) -> str:
    answer = "Yes, please." if order["gift"] else "No, it is for myself."
    return (
        f"Agent: Which item, and how many?\nCustomer: {order['item']}, {WORDS[order['quantity']]} of them.\n"
        f"Agent: They are {_price(order)} each. When and where do you need them?\n"
        f"Customer: On {_in_words(order)}, in {order['city']}.\nAgent: Is it a gift?\nCustomer: {answer}\n"
        f"Agent: Your name?\nCustomer: {order['customer']}"
    )


def _corrected(draws: Draws, order: Order) -> str:
    before = order["quantity"] + draws.number(1, 5)
    earlier = _other_day(draws, order)
    wish = (
        "Please wrap it as a gift." if order["gift"] else "It is no longer a gift, so leave out the wrapping."
    )
    return (
        f'I have to correct my order of the item "{order["item"]}" at {_price(order)} each: not {before} '
        f"units but {order['quantity']}, and the delivery is not on {earlier} but on {_in_words(order)}. The "
        f"city is still {order['city']}. {wish} {order['customer']}"
    )


def _second_person(draws: Draws, order: Order) -> str:
    other = draws.one([name for name in FIRST if name not in order["customer"]])
    city = draws.one([name for name in CITIES if name != order["city"]])
    item = draws.one([name for name in ITEMS if name != order["item"]])
    wish = "a gift" if order["gift"] else "not a gift"
    return (
        f"My colleague {other} in {city} bought a {item} from you last year and was happy with it. My own order "
        f'now is for the item "{order["item"]}", {WORDS[order["quantity"]]} units at {_price(order)} each. Send '
        f"them to {order['city']} so that they are delivered on {_in_words(order)}; the order is {wish}. Please "
        f"put it on my name, {order['customer']}."
    )


def _totals(draws: Draws, order: Order) -> str:
    cents = round(order["unit_price"] * 100) * order["quantity"]
    ordered = _other_day(draws, order)
    wish = "yes" if order["gift"] else "no"
    return (
        f"ORDER CONFIRMATION\nOrdered on {ordered} by {order['customer']}. Our warehouse in "
        f"{draws.one([name for name in CITIES if name != order['city']])} will send the goods to you.\n"
        f"- {order['quantity']} x {order['item']}, {_price(order)} each: EUR {cents / 100:.2f}\n"
        f"- delivery to {order['city']}: EUR 4.95\nTotal: EUR {cents / 100 + 4.95:.2f}\n"
        f"Arrives on {_in_words(order)}. Gift wrapping: {wish}."
    )


def _price(order: Order) -> str:
    return f"EUR {order['unit_price']:.2f}"


def _in_words(order: Order) -> str:
    return _spelled(date.fromisoformat(order["delivery_date"]))


def _other_day(draws: Draws, order: Order) -> str:
    """Return another date, some days earlier."""
    return _spelled(date.fromisoformat(order["delivery_date"]) - timedelta(days=draws.number(2, 12)))


def _spelled(day: date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def _day(draws: Draws) -> date:
    return date(2031, 1, 15) + timedelta(days=draws.number(0, 330))


TOPICS: dict[str, tuple[int, Callable[[Draws, Order], str]]] = {
    "form": (1, _form),
    "line": (1, _line),
    "email": (2, _email),
    "phone_note": (2, _note),
    "chat": (2, _chat),
    "correction": (3, _corrected),
    "second_person": (3, _second_person),
    "confirmation": (3, _totals),
}
"""The level of each topic, and what writes the text of an order."""
