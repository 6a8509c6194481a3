"""For the server that forks the clients of the family "objects", and imports this: botocore's models, parsed once.

Each process would parse them anew, 0.1 s of CPU of the second that an attempt has.
"""

import functools

from botocore.loaders import JSONFileLoader
from botocore.session import Session

_read = functools.cache(JSONFileLoader().load_file)
JSONFileLoader.load_file = lambda self, path: _read(path)
Session().create_client("s3", region_name="us-east-1", aws_access_key_id="any", aws_secret_access_key="any").close()
