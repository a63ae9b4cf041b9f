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
PUBLIC: Final[dict[str, tuple[str, ...]]] = {
    "lost_card": ("My card is lost, what shall I do?", "Somebody stole my purse with the card in it."),
    "card_arrival": ("When does my new card come?", "The card that I ordered is not here yet."),
    "card_declined": ("My card does not work in shops.", "Why was my payment by card refused?"),
    "unknown_payment": ("I do not know this payment.", "There is a charge that is not mine."),
    "refund": ("When do I get my refund?", "The shop says that my money was sent back."),
    "transfer_delay": ("My transfer has not arrived.", "How long does a transfer take?"),
    "transfer_recall": ("I sent money to the wrong account.", "Can I take a transfer back?"),
    "address_change": ("I have moved, how do I tell you?", "Please change where you send my letters."),
    "contact_change": ("I have a new phone number.", "How do I change my e-mail?"),
    "login_problem": ("I cannot log in.", "I have forgotten my password."),
    "identity_check": ("How do I prove who I am?", "Why do you ask for my passport?"),
    "fee": ("Why did I pay a fee?", "What does the account cost?"),
    "cash_machine": ("The cash machine kept my card.", "The machine gave me too little money."),
    "direct_debit": ("How do I stop a direct debit?", "A company takes money every month."),
    "statement": ("I need a statement.", "Where do I find last year's papers?"),
    "loan": ("Can I get a loan?", "What does it cost to borrow money?"),
    "close_account": ("I want to close my account.", "How do I leave this bank?"),
    "scam_report": ("I got a strange message from you.", "Somebody called and asked for my code."),
}
"""What stands on the bank's own pages, with the same answers: nobody's messages, so the first release may learn from them."""
