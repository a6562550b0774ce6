"""Placeholders and media: which row owns an item, and putting features where the placeholders stand."""

import torch


def owner_rows(placeholders: list[int], items: list[int], what: str) -> list[int]:
    """The row of each item, from the placeholders that every row holds.

    Args:
        placeholders: placeholders of each row.
        items: features of each item, in order of appearance.
        what: name of an item, for errors.

    Raises:
        ValueError: an item does not fit its row, or a row's placeholders are left over, with row and item.
    """
    owners: list[int] = []
    item = 0
    for row, wanted in enumerate(placeholders):
        found = 0
        while found < wanted and item < len(items):
            found += items[item]
            owners.append(row)
            item += 1
        if found > wanted:
            raise ValueError(
                f"row {row}: {what} {item - 1} has {items[item - 1]} features, but the row holds only {wanted} "
                f"placeholders for {found} features so far"
            )
        if found < wanted:
            raise ValueError(
                f"row {row} holds {wanted} {what} placeholders, but only {found} {what} features are given"
            )
    if item < len(items):
        raise ValueError(f"{len(items)} {what} items are given, but the placeholders of all rows take only {item}")
    return owners


def cut_by_rows(placeholders: list[int], items: list[torch.Tensor]) -> list[torch.Tensor]:
    """Features in one piece `[tokens, width]`, cut where rows end; anything else is given back as it is.

    transformers hands them over in one piece for each chunk of a prompt that is read in chunks.
    """
    wanted = [count for count in placeholders if count]
    return list(items[0].split(wanted)) if len(items) == 1 and len(items[0]) == sum(wanted) else items


def splice(embeds: torch.Tensor, mask: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Puts `features` `[tokens, width]` into `embeds` `[batch, length, width]` at `mask` `[batch, length]`."""
    return embeds.masked_scatter(mask.unsqueeze(-1), features.to(embeds.dtype))
