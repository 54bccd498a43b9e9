"""Turn the ids that a model writes into pieces of text, as soon as each piece is certain."""

SPLIT_CHARACTER = "\ufffd"  # decoders put it in place of a character whose bytes are incomplete


class Text:
    """The text of one row, given out in pieces that are final.

    Two things are held back until more tokens come: a character that is split over several tokens,
    and text that may be the beginning of a stop text.
    """

    def __init__(self, decode, stops):
        self.decode = decode
        self.stops = stops
        self.context = []  # the ids of the last text that was read
        self.new = []  # the ids after them, whose text is not complete yet
        self.held_back = ""  # text that was read, but is not final
        self.is_stopped = False  # a stop text was found: nothing follows

    def add(self, token):
        """Return the piece that becomes final with this token. It is often empty."""
        if self.is_stopped:
            return ""
        self.new.append(token)
        text = self._read()
        if text == "" or text.endswith(SPLIT_CHARACTER):
            return ""
        self.context = self.new
        self.new = []
        return self._give(text, is_whole=False)

    def finish(self):
        """Return the last piece, after the last token: nothing is held back any longer."""
        if self.is_stopped:
            return ""
        return self._give(self._read(), is_whole=True)

    def _read(self):
        """Return the text of the new ids.

        It depends on the ids before them: the first word of a text has no space, for example. But
        the last few of these are enough, and to decode all of them for each token would take longer
        than a GPU takes for a step.
        """
        before = self.decode(self.context)
        return self.decode(self.context + self.new)[len(before) :]

    def _give(self, text, is_whole):
        """Return what is final of the text that was held back and of `text`, which follows it.

        It ends before a stop text and, unless the text is whole, before what may be the beginning
        of a stop text.
        """
        text = self.held_back + text
        end = 0
        while end < len(text):
            self.is_stopped = text.startswith(self.stops, end)
            may_stop = any(stop.startswith(text[end:]) for stop in self.stops)
            if self.is_stopped or (may_stop and not is_whole):
                break
            end += 1
        self.held_back = text[end:]
        return text[:end]
