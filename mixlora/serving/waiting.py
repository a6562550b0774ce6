"""The bounded queue in front of the batch: users take turns, each user's own requests in order."""

from collections import OrderedDict, deque
from threading import Lock

from mixlora.serving.request import Request


class QueueFullError(RuntimeError):
    """As many requests wait as may."""


class FairQueue:
    """Requests by user. Taking goes round the users, so one who sends a hundred delays another by one of them.

    Args:
        most: requests that may wait.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._users: OrderedDict[str, deque[Request]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._users.values()))

    def requests(self) -> list[Request]:
        """Those that wait."""
        with self._lock:
            return [request for requests in self._users.values() for request in requests]

    def put(self, request: Request) -> None:
        """Adds a request.

        Raises:
            QueueFullError: as many as may wait do so already.
        """
        with self._lock:
            waiting = sum(map(len, self._users.values()))
            if waiting >= self.most:
                raise QueueFullError(f"{waiting} requests wait already, at most {self.most} may; try again later")
            self._users.setdefault(request.user, deque()).append(request)

    def peek(self) -> Request | None:
        """The next one, which stays where it is."""
        with self._lock:
            return next(iter(self._users.values()))[0] if self._users else None

    def take(self) -> Request | None:
        """The next one. Its user goes behind all others."""
        with self._lock:
            if not self._users:
                return None
            user, requests = self._users.popitem(last=False)
            request = requests.popleft()
            if requests:
                self._users[user] = requests
            return request

    def remove_over(self) -> list[Request]:
        """Takes out what was cancelled or has no time left."""
        with self._lock:
            over = [request for requests in self._users.values() for request in requests if request.must_end()]
            for request in over:
                self._users[request.user].remove(request)
                if not self._users[request.user]:
                    del self._users[request.user]
            return over
