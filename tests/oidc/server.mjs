// An authorization server (oidc-provider, a certified OpenID provider) and, behind it, a FHIR server that takes its
// tokens only: what the sign-in of the FHIR connector is judged by.
//
//   node server.mjs NODE_MODULES PORT SETTINGS     (SETTINGS: JSON with clients, scopes, ttl_s, upstream)
//
// It checks of an assertion also what SMART App Launch 2.2 adds to RFC 7523. GET /control tells what came; POST
// /control changes how it behaves.
import { createServer } from 'node:http';
import { pathToFileURL } from 'node:url';

const [modules, port, given] = process.argv.slice(2);
const { default: Provider, errors } = await import(pathToFileURL(`${modules}/oidc-provider/lib/index.js`));
const settings = JSON.parse(given);
const origin = `http://127.0.0.1:${port}`;
const behaviour = { ttl_s: settings.ttl_s ?? 300, delay_s: 0 };
const seen = { token_requests: 0, granted: [], refused: [], assertions: [] };
const live = new Map();

function checkAssertion(ctx, claims, header) {
  const now = Date.now() / 1000;
  const faults = [
    [header.typ !== 'JWT', 'typ must be JWT'],
    [!header.kid, 'kid is missing'],
    [claims.sub !== claims.iss, 'sub must be iss'],
    [claims.aud !== `${origin}/token`, 'aud must be the token endpoint'],
    [claims.exp > now + 300, 'exp is more than five minutes away'],
  ];
  seen.assertions.push({ header, claims });
  const fault = faults.find(([isWrong]) => isWrong);
  if (fault) throw new errors.InvalidClientAuth(fault[1]);
}

const provider = new Provider(origin, {
  clients: settings.clients.map((client) => ({
    grant_types: ['client_credentials'],
    redirect_uris: [],
    response_types: [],
    token_endpoint_auth_method: 'private_key_jwt',
    ...client,
  })),
  scopes: settings.scopes,
  clientAuthMethods: ['private_key_jwt'],
  enabledJWA: { clientAuthSigningAlgValues: ['RS384', 'ES384'] },
  features: { clientCredentials: { enabled: true }, devInteractions: { enabled: false } },
  assertJwtClientAuthClaimsAndHeader: checkAssertion,
  // Its own dispatcher refuses loopback addresses, where all of a test is.
  fetch: (url, { dispatcher, ...options }) => fetch(url, options),
  ttl: { ClientCredentials: () => behaviour.ttl_s },
});
provider.on('grant.success', (ctx) => {
  live.set(ctx.body.access_token, Date.now() + behaviour.ttl_s * 1000);
  seen.granted.push(ctx.body.scope);
});
provider.on('grant.error', (ctx, error) => {
  seen.refused.push([error.error, error.error_detail, error.cause?.message].join(' '));
});

async function bodyOf(request) {
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  return Buffer.concat(chunks);
}

function answer(response, status, body) {
  const text = JSON.stringify(body);
  response.writeHead(status, { 'content-type': 'application/json', 'content-length': Buffer.byteLength(text) });
  response.end(text);
}

async function control(request, response) {
  const wanted = request.method === 'POST' ? JSON.parse(await bodyOf(request)) : {};
  if (wanted.revoke) live.clear();
  Object.assign(behaviour, wanted);
  answer(response, 200, seen);
}

async function fhir(request, response) {
  if (request.url === '/fhir/.well-known/smart-configuration') {
    answer(response, 200, {
      token_endpoint: `${origin}/token`,
      token_endpoint_auth_methods_supported: ['private_key_jwt'],
      token_endpoint_auth_signing_alg_values_supported: ['RS384', 'ES384'],
      grant_types_supported: ['client_credentials'],
      capabilities: ['client-confidential-asymmetric', 'permission-v2'],
    });
    return;
  }
  const body = await bodyOf(request);
  const token = (request.headers.authorization ?? '').replace(/^Bearer /u, '');
  if (!(live.get(token) > Date.now())) {
    answer(response, 401, {
      resourceType: 'OperationOutcome',
      issue: [{ severity: 'error', code: 'login', diagnostics: 'no valid token' }],
    });
    return;
  }
  const { host, authorization, connection, ...headers } = request.headers;
  const passed = await fetch(settings.upstream + request.url.slice('/fhir'.length), {
    method: request.method,
    headers,
    body: request.method === 'GET' ? undefined : body,
  });
  response.writeHead(passed.status, { 'content-type': passed.headers.get('content-type') ?? 'application/json' });
  response.end(Buffer.from(await passed.arrayBuffer()));
}

async function route(request, response) {
  if (request.url === '/control') return control(request, response);
  if (request.url.startsWith('/fhir')) return fhir(request, response);
  if (request.url === '/token') {
    seen.token_requests += 1;
    await new Promise((resolve) => setTimeout(resolve, behaviour.delay_s * 1000));
  }
  return provider.callback()(request, response);
}

createServer((request, response) => {
  route(request, response).catch((error) => answer(response, 500, { error: String(error) }));
}).listen(Number(port), '127.0.0.1');
