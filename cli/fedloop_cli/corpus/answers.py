"""What the demo's bank answers its customers: the better answers that users give, and what it publishes for everybody."""

from __future__ import annotations

from typing import Final

ANSWERS: Final[dict[str, str]] = {
    "lost_card": "Your card is frozen now. Order a new one under Cards.",
    "card_arrival": "New cards take five working days. Track yours under Cards.",
    "card_declined": "Please reset your card under Cards, then pay again.",
    "unknown_payment": "Open the payment and tap Dispute. We check it in two days.",
    "refund": "Refunds take ten days. You see them under Payments.",
    "transfer_delay": "Transfers take one working day. Track yours under Payments.",
    "transfer_recall": "Open the transfer and tap Recall. Be quick, please.",
    "address_change": "Change your address under Profile. It counts at once.",
    "contact_change": "Change your contact details under Profile.",
    "login_problem": "Tap Help at the login to set a new password.",
    "identity_check": "Send us a photo of your passport under Profile.",
    "fee": "All fees are listed under Account. Tap one to contest it.",
    "cash_machine": "Report the machine under Cards. We check it in two days.",
    "direct_debit": "You find all direct debits under Payments. Tap one to stop it.",
    "statement": "Download your statements under Account.",
    "loan": "See what you can borrow under Loans. It takes two minutes.",
    "close_account": "Close your account under Account. Empty it first, please.",
    "scam_report": "Thank you. Forward it to us and delete it. Never share a code.",
}
"""By what a message is about."""
PUBLIC: Final[dict[str, str]] = {
    "lost_card": "My card is lost, what shall I do?",
    "card_arrival": "When does my new card come?",
    "card_declined": "My card does not work in shops.",
    "unknown_payment": "I do not know this payment.",
    "refund": "When do I get my refund?",
    "transfer_delay": "My transfer has not arrived.",
    "transfer_recall": "I sent money to the wrong account.",
    "address_change": "I have moved, how do I tell you?",
    "contact_change": "I have a new phone number.",
    "login_problem": "I cannot log in.",
    "identity_check": "How do I prove who I am?",
    "fee": "Why did I pay a fee?",
    "cash_machine": "The cash machine kept my card.",
    "direct_debit": "How do I stop a direct debit?",
    "statement": "I need a statement.",
    "loan": "Can I get a loan?",
    "close_account": "I want to close my account.",
    "scam_report": "I got a strange message from you.",
}
"""What stands on the bank's own pages, with the same answers: nobody's messages, so the first release may learn from them."""
